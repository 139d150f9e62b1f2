"""The debug mode on whole recipes of every kind, and on faults: it names the first thing that is wrong, exit code 1."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mistral_dist.debug import FILE
from tests import faults
from tests.conftest import WriteRecipe
from tests.launch import lines, mistral_dist, run_dir

PASSED = "single-GPU checks passed; NCCL not tested"
LOOKS = ["micro-batch", "targets", "trained parameters", "pack borders"]
LOOKS += ["gradients of step 1", "gradients of step 2", "memory", "loss", "resume"]
NO_LABELS = {"labels": [], "prompt": "Classify the text as one of: {labels}.\n\n{text}", "system": None}


def looks(said: str) -> list[str]:
    """What was found well, in order."""
    return [line.split(":")[0].removeprefix("   ok  ") for line in said.splitlines() if line.startswith("   ok  ")]


def rows_of(kind: str, texts: list[dict[str, str]]) -> list[dict[str, Any]]:
    if kind == "pretrain":
        return [{"text": " ".join(row["text"] for row in texts[n : n + 12])} for n in range(60)]
    return [{"messages": [{"role": "user", "content": row["text"]}, {"role": "assistant", "content": row["label"]}]} for row in texts]


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=pytest.mark.matrix) for kind in ("chat", "pretrain", "streaming")])
def test_recipes_of_other_kinds_pass(kind: str, write_recipe: WriteRecipe, texts: list[dict[str, str]]) -> None:
    task = {"kind": "pretrain" if kind == "pretrain" else "chat", **NO_LABELS}
    streaming = {"data": {"streaming": True, "block": 16}, "train": {"steps": 500, "global_batch_size": 3}} if kind == "streaming" else {}
    lora = {"init_lora_weights": True, "lora_dropout": 0.1}
    recipe = write_recipe(rows=rows_of(kind, texts), task=task, model={"dtype": "bfloat16"}, lora=lora, **streaming)
    done = mistral_dist("train", recipe, "--debug")
    assert done.returncode == 0, done.stdout + done.stderr
    assert looks(done.stdout) == LOOKS
    assert done.stdout.splitlines()[-1] == PASSED
    assert not run_dir(recipe).exists()


@pytest.fixture(scope="module")
def recipe(recipe_writer: Callable[[Path], WriteRecipe], tmp_path_factory: pytest.TempPathFactory) -> Path:
    write = recipe_writer(tmp_path_factory.mktemp("debug"))
    made = write(lora={"init_lora_weights": True}, train={"global_batch_size": 2})
    assert mistral_dist("prepare", made).returncode == 0
    return made


FAULTS = {
    # what is wrong: how it is put there, the look that finds it, what it says
    "shifted targets": ({"shifted_targets": True}, "targets", "a target is not the token after the one that predicts it"),
    "no borders": ({"no_borders": True}, "pack borders", "attention crosses from one example to the next"),
    "a dead gradient": ({"dead_gradient": True}, "gradients of step 1", "zero everywhere"),
    "no number": ({"nan_loss": [[3, 1]]}, "anomaly detection", "step 3, micro-step 2, backward: the forward pass gives"),
    "uphill": ({"uphill": True}, "loss", "it does not go down"),
    "forgotten moments": ({"forgotten_moments": True}, "resume", "from checkpoint-10 it ends with other bits"),
}


@pytest.mark.parametrize("fault", [name if name == "no borders" else pytest.param(name, marks=pytest.mark.matrix) for name in FAULTS])
def test_the_first_thing_that_is_wrong_is_named(fault: str, recipe: Path) -> None:
    injected, look, said = FAULTS[fault]
    done = mistral_dist("train", recipe, "--debug", **faults.environment(**injected))
    assert done.returncode == 1, done.stdout + done.stderr
    error = done.stderr.splitlines()[-1]
    assert error.startswith(f"error: {look}: ") and said in error
    assert f"WRONG  {look}: " in done.stdout
    assert PASSED not in done.stdout
    before = LOOKS[: LOOKS.index(look)] if look in LOOKS else LOOKS[: LOOKS.index("loss")]
    assert looks(done.stdout) == before
    folder = run_dir(recipe).with_name(f"{run_dir(recipe).name}-debug")
    assert [entry["ok"] for entry in lines(folder / FILE)].count(False) == (look != "resume")
