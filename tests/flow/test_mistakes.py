"""What a user can get wrong: one line with place and remedy, exit code 2, no traceback, no model loaded; everywhere."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mistral_dist.run import Lease, RunDirectory
from tests.conftest import WriteRecipe
from tests.launch import ROOT, run_dir, small_disk

ENVIRONMENT = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
WAYS = {
    "mistral-dist": ["mistral-dist", "train"],
    "single_gpu.sh": [str(ROOT / "launch/single_gpu.sh")],
    "multi_gpu.sh": [str(ROOT / "launch/multi_gpu.sh")],
    "debug.sh": [str(ROOT / "launch/debug.sh")],
    "multi_node.sh": [str(ROOT / "launch/multi_node.sh"), "--processes", "1", "--nodes", "1"],
    "slurm": [str(ROOT / "slurm/train.sh")],
}


def refused(way: str, recipe: Path, *overrides: str) -> str:
    """Start in one of the ways; return the one line that it answers with."""
    done = subprocess.run(
        [*WAYS[way], str(recipe), *overrides], capture_output=True, text=True, check=False, cwd=ROOT, env=ENVIRONMENT, timeout=120
    )
    said = [line for line in (done.stdout + done.stderr).splitlines() if line and "gemm_4bit" not in line]
    assert done.returncode == 2, said
    assert "Traceback" not in done.stdout + done.stderr
    assert len(said) == 1, said
    return said[0]


def break_recipe(mistake: str, write: WriteRecipe, tmp_path: Path, texts: list[dict[str, str]]) -> tuple[Path, list[str]]:
    """A recipe with one mistake, and what the answer must contain."""
    if mistake == "wrong key":
        return write(optim={"learning_rates": 1}), ["small.yaml:1", "optim.learning_rates", "did you mean optim.learning_rate?"]
    if mistake == "wrong type":
        return write(train={"epochs": "two"}), ["small.yaml:1", "train.epochs", "valid integer", "'two'"]
    if mistake == "missing file":
        recipe = write()
        (tmp_path / "small.jsonl").unlink()
        return recipe, ["small.jsonl: no such file", "set data.sources"]
    if mistake == "empty split":
        return write(rows=texts[:6]), ["the test split is empty", "6 rows read", "data.test_fraction=0"]
    if mistake == "target-less example":
        chat: list[dict[str, Any]] = [{"messages": [{"role": "user", "content": f"hi {n}"}]} for n in range(3)]
        recipe = write(rows=chat, task={"kind": "chat", "labels": [], "prompt": "{text}"})
        return recipe, ["small.jsonl:1", "no answer to learn from", "add one or remove the row"]
    if mistake == "missing model":
        return write(model={"path": str(tmp_path)}), ["model.path", "no model there"]
    assert mistake == "missing recipe"
    return tmp_path / "nothing.yaml", ["nothing.yaml: no such recipe", "mistral-dist init"]


MISTAKES = ("wrong key", "wrong type", "missing file", "empty split", "target-less example", "missing model", "missing recipe")


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_answered_in_one_line(mistake: str, write_recipe: WriteRecipe, tmp_path: Path, texts: list[dict[str, str]]) -> None:
    recipe, words = break_recipe(mistake, write_recipe, tmp_path, texts)
    line = refused("mistral-dist", recipe)
    for word in words:
        assert word in line


@pytest.mark.parametrize("way", [way for way in WAYS if way != "mistral-dist"])
@pytest.mark.parametrize("mistake", ["wrong key", "empty split"])
def test_also_through_the_scripts(way: str, mistake: str, write_recipe: WriteRecipe, tmp_path: Path, texts: list[dict[str, str]]) -> None:
    recipe, words = break_recipe(mistake, write_recipe, tmp_path, texts)
    if way == "slurm" and mistake == "empty split":
        words = ["no prepared data there; run `mistral-dist prepare`"]  # which is the login node's to do, and finds the mistake
    line = refused(way, recipe)
    for word in words:
        assert word in line


def test_a_second_start_names_the_holder(write_recipe: WriteRecipe) -> None:
    recipe = write_recipe()
    with Lease(RunDirectory(run_dir(recipe))):
        line = refused("mistral-dist", recipe)
    for word in (f"in use by process {os.getpid()} on this machine", "run.dir=..."):
        assert word in line
    assert not (run_dir(recipe) / "status.json").exists(), "the refused start must not touch the status"


def test_a_deepspeed_configuration_that_would_cast_the_weights(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    """Found by the workers, after they started: still one line, and the right exit code."""
    recipe = write_recipe()
    deepspeed = json.loads((ROOT / "configs/deepspeed/zero2.json").read_text())
    (tmp_path / "zero2.json").write_text(json.dumps({**deepspeed, "bf16": {"enabled": True}}))
    accelerate = (ROOT / "configs/accelerate/multi_gpu.yaml").read_text()
    (tmp_path / "own.yaml").write_text(accelerate.replace("configs/deepspeed/zero2.json", str(tmp_path / "zero2.json")))
    command = ["mistral-dist", "train", str(recipe), "--config-file", str(tmp_path / "own.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=ENVIRONMENT, timeout=120)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "bf16 must not be enabled" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_more_processes_than_packs(write_recipe: WriteRecipe) -> None:
    line = refused("mistral-dist", write_recipe(), "--processes", "5")
    assert "train.global_batch_size=4: cannot be shared by 5 processes" in line


@pytest.mark.parametrize("words", [["--zero", "2"], ["--gpus", "2"], ["--fresh"], ["--check"], ["--processes", "1"]])
def test_what_the_debug_mode_would_ignore(write_recipe: WriteRecipe, words: list[str]) -> None:
    line = refused("mistral-dist", write_recipe(), "--debug", *words)
    assert "--debug: one process without ZeRO on one machine, always begun anew; no --gpus" in line


def test_gpus_that_are_not_there(write_recipe: WriteRecipe) -> None:
    line = refused("mistral-dist", write_recipe(), "--gpus", "2")
    assert "--gpus 2: no GPU is visible here; see CUDA_VISIBLE_DEVICES" in line
    assert "both say how many" in refused("mistral-dist", write_recipe(), "--gpus", "2", "--processes", "2")


def test_a_bare_accelerate_launch_names_the_command_that_is_missing(write_recipe: WriteRecipe) -> None:
    recipe = write_recipe()
    done = subprocess.run(
        ["accelerate", "launch", "--config_file", "configs/accelerate/single_gpu.yaml", "-m", "mistral_dist.train", str(recipe)],
        capture_output=True, text=True, check=False, cwd=ROOT, env=ENVIRONMENT, timeout=120,
    )  # fmt: skip
    assert done.returncode != 0
    assert "no prepared data there; run `mistral-dist prepare`" in done.stderr
    assert json.loads((run_dir(recipe) / "status.json").read_text())["exit_code"] == 2


def test_a_mistyped_recipe_does_not_wait_for_imports(write_recipe: WriteRecipe) -> None:
    """Not a timing: importing torch is what takes the time, so it must not have happened."""
    recipe = write_recipe(optim={"learning_rates": 1})
    code = (
        "import sys\nfrom mistral_dist import cli\nsys.argv[1:] = ['train', sys.argv[1]]\n"
        "try:\n    cli.main()\nexcept SystemExit as end:\n    print(end.code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(recipe)], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.stdout.split() == ["2", "False"]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({}, "how many machines? Add --nodes 2 --node-rank 0 --main-address HOST"),
        ({"NODES": "2"}, "--nodes 2: which of them is this machine? Add --node-rank 0"),
        ({"NODES": "2", "NODE_RANK": "0"}, "--nodes 2: where do they meet? Add --main-address HOST"),
        ({"NODES": "2", "NODE_RANK": "2", "MAIN_ADDRESS": "gpu1"}, "--node-rank 2: of 2 nodes the last is 1"),
        ({"NODES": "2", "NODE_RANK": "0", "MAIN_ADDRESS": "gpu1", "GPUS": "3"}, "--gpus 3: no GPU is visible here"),
        ({"NODES": "2", "NODE_RANK": "1", "MAIN_ADDRESS": "gpu1"}, "no prepared data there; run `mistral-dist prepare`"),
        (
            {"NODES": "2", "NODE_RANK": "1", "MAIN_ADDRESS": "gpu1", "MISTRAL_DIST_JOIN_SECONDS": "30m"},
            "MISTRAL_DIST_JOIN_SECONDS=30m: a whole number of seconds is wanted",
        ),
    ],
)
def test_what_several_nodes_need_is_asked_for(
    given: dict[str, str], told: str, write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the environment, as a scheduler's script would say it."""
    for name, value in given.items():
        monkeypatch.setitem(ENVIRONMENT, name, value)
    monkeypatch.setitem(WAYS, "nodes", [str(ROOT / "launch/multi_node.sh")])
    assert told in refused("nodes", write_recipe())


@pytest.mark.parametrize("script", ["train.sh", "evaluate.sh"])
def test_what_the_site_wants_is_known_from_any_folder(script: str, tmp_path: Path) -> None:
    """The site.env beside the script, where the current folder has none."""
    shutil.copytree(ROOT / "slurm", tmp_path / "slurm")
    (tmp_path / "slurm" / "site.env").write_text("false\n")
    (tmp_path / "elsewhere").mkdir()
    done = subprocess.run(
        [tmp_path / "slurm" / script, "x"], capture_output=True, text=True, check=False, cwd=tmp_path / "elsewhere", env=ENVIRONMENT
    )
    assert done.returncode == 2
    assert done.stderr == f"{tmp_path}/slurm/site.env, line 1: failed: false\n"


def test_a_run_directory_that_cannot_be_written(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    line = refused("mistral-dist", write_recipe(), f"run.dir={tmp_path}/file/run")
    assert f"{tmp_path}/file is no folder; set run.dir=..." in line


def test_a_run_directory_on_a_read_only_file_system(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    recipe = write_recipe()
    with small_disk(tmp_path / "disk", "1m") as disk:
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        line = refused("mistral-dist", recipe, f"run.dir={disk}/runs/one")
    assert f"{disk} cannot be written to; set run.dir=..." in line
