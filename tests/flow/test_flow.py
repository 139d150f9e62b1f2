"""The whole way, as a user goes it: prepare, train, evaluate, chat; and the adapter in the hands of plain PEFT."""

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from mistral_dist.data.shards import read_shards
from tests.conftest import WriteRecipe
from tests.flow.browser import look
from tests.launch import COMMAND, ROOT, kill, lines, mistral_dist, run_dir, status, wait_for, workers

PLAIN_PEFT = """
import json, sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
base_path, adapter, test, labels, prompt, system = sys.argv[1:]
nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32)
base = AutoModelForCausalLM.from_pretrained(base_path, quantization_config=nf4, dtype=torch.float32)
model = PeftModel.from_pretrained(base, adapter).eval()
for module in model.modules():  # on CPUs with AVX512-BF16 bitsandbytes computes in bfloat16, whatever was asked for: scores move by 1e-2
    if hasattr(module, "support_avx512bf16_for_cpu"):
        module.support_avx512bf16_for_cpu = False
tokenizer = AutoTokenizer.from_pretrained(adapter)
labels = labels.split(",")
for line in open(test):
    row = json.loads(line)
    question = prompt.replace("{labels}", ", ".join(labels)).replace("{text}", row["text"])
    turns = [{"role": "system", "content": system}, {"role": "user", "content": question}]
    start = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    scores = []
    for label in labels:
        ids = start + tokenizer.encode(label + tokenizer.eos_token, add_special_tokens=False)
        with torch.no_grad():
            logprobs = model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)
        scores.append(sum(float(logprobs[i - 1, ids[i]]) for i in range(len(start), len(ids))))
    print(json.dumps({"id": row["id"], "tuned": labels[scores.index(max(scores))]}))
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, small_model: Path, texts: list[dict[str, str]]) -> Path:
    """A finished and evaluated run of 30 steps."""
    from tests.conftest import LABELS

    folder = tmp_path_factory.mktemp("flow")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    recipe = {
        "version": 1,
        "task": {"kind": "classification", "labels": list(LABELS), "prompt": "Which of {labels}?\n{text}", "system": "Answer."},
        "data": {"sources": [{"path": str(folder / "rows.jsonl")}], "dir": str(folder / "data"), "max_length": 192},
        "model": {"name": "test/small", "path": str(small_model), "dtype": "float32"},
        "lora": {"r": 4, "lora_alpha": 8},
        "optim": {"learning_rate": 1e-2},
        "train": {"epochs": 3, "steps": 30, "global_batch_size": 4, "gradient_checkpointing": False},
        "run": {"dir": str(folder / "runs" / "flow")},
    }
    (folder / "flow.yaml").write_text(json.dumps(recipe))
    done = mistral_dist("train", folder / "flow.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    done = mistral_dist("evaluate", folder / "runs" / "flow")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "f1 macro" in done.stdout
    return folder / "flow.yaml"


def test_the_run_directory_is_as_the_contract_says(trained: Path) -> None:
    run = run_dir(trained)
    found = status(run)
    assert set(found) == {"state", "exit_code", "message", "step", "steps", "checkpoint", "launches", "job", "base", "held_out", "updated"}
    assert (found["launches"], found["job"]) == (1, None), "started once, not by SLURM"
    assert (found["state"], found["exit_code"], found["step"], found["checkpoint"]) == ("finished", 0, 30, "checkpoint-30")
    assert set(lines(run / "metrics.jsonl")[0]) == {
        "step", "epoch", "loss", "learning_rate", "grad_norm", "trained_tokens", "tokens", "examples", "tokens_per_second", "seconds",
        "memory_bytes",
    }  # fmt: skip
    assert {path.name for path in (run / "adapter").iterdir()} >= {"adapter_model.safetensors", "adapter_config.json", "README.md"}
    assert json.loads((run / "adapter/adapter_config.json").read_text())["base_model_name_or_path"] == "test/small"
    assert not (run / "lease.json").exists()
    assert not list(run.rglob(".*")), "nothing half-written is left"


def test_the_evaluation_is_as_the_contract_says(trained: Path) -> None:
    run = run_dir(trained)
    test = json.loads((run / "evaluation/test.json").read_text())
    predictions = lines(run / "evaluation/predictions.jsonl")
    manifest = json.loads((trained.parent / "data/manifest.json").read_text())
    assert test["n"] == len(predictions) == manifest["examples"]["test"]
    for model in ("base", "tuned"):
        for measure in ("accuracy", "precision_macro", "recall_macro", "f1_macro"):
            assert set(test[model][measure]) == {"value", "low", "high"}
        right = sum(line[model] == line["label"] for line in predictions)
        assert test[model]["accuracy"]["value"] == pytest.approx(right / len(predictions), abs=1e-12)
        assert sum(map(sum, test[model]["confusion_matrix"])) == test["n"]
    assert test["labels"] == ["numpy", "pandas", "sympy", "networkx", "torch", "transformers"]
    # three layers cannot learn the task (the demo shows that thirty can), but they must have learned something
    steps = lines(run / "metrics.jsonl")
    assert steps[-1]["loss"] < 0.5 * steps[0]["loss"]


def test_plain_peft_gives_the_same_predictions(trained: Path) -> None:
    """A fresh process that knows nothing of this package: transformers, PEFT, the base and the adapter."""
    run, recipe = run_dir(trained), json.loads(trained.read_text())
    test = trained.parent / "test.jsonl"
    test.write_text("".join(json.dumps(row) + "\n" for row in read_shards(trained.parent / "data/test")))
    words = [recipe["model"]["path"], run / "adapter", test, ",".join(recipe["task"]["labels"]), recipe["task"]["prompt"], "Answer."]
    done = subprocess.run(
        [sys.executable, "-c", PLAIN_PEFT, *map(str, words)], capture_output=True, text=True, check=True, cwd=trained.parent
    )
    plain = {line["id"]: line["tuned"] for line in map(json.loads, done.stdout.splitlines())}
    ours = {line["id"]: line["tuned"] for line in lines(run / "evaluation/predictions.jsonl")}
    assert plain == ours


def test_predictions_do_not_depend_on_the_number_of_ranks_or_the_batch(trained: Path, tmp_path: Path) -> None:
    """On any number of ranks all numbers are the same to the last bit; with one example a row, or seven, what is said is."""
    run = tmp_path / "run"
    shutil.copytree(run_dir(trained), run)

    def evaluated(ranks: int, *words: str) -> list[bytes]:
        done = mistral_dist("evaluate", run, *words, "--processes", str(ranks))
        assert done.returncode == 0, done.stdout + done.stderr
        return written()

    def written() -> list[bytes]:
        return [(run / f"evaluation/{name}.jsonl").read_bytes() for name in ("predictions", "scores", "worst")]

    likely = written()
    assert evaluated(1) == likely
    assert evaluated(3) == likely
    assert evaluated(2, "evaluate.max_tokens=1")[0] == likely[0]
    seven = evaluated(2, "evaluate.method=generation", "evaluate.batch_size=7")
    assert evaluated(3, "evaluate.method=generation", "evaluate.batch_size=7") == seven
    assert evaluated(1, "evaluate.method=generation", "evaluate.batch_size=1")[0] == seven[0]


def test_a_killed_evaluation_goes_on_where_it_was(trained: Path, tmp_path: Path) -> None:
    """On another number of ranks, to the same bytes; and what was found before is not worked out again."""
    run = tmp_path / "run"
    shutil.copytree(run_dir(trained), run)
    wanted = (run / "evaluation/predictions.jsonl").read_bytes()
    shutil.rmtree(run / "evaluation")
    words = ["evaluate", str(run), "evaluate.max_tokens=300", "--processes"]
    kept = "evaluation/unfinished-*.jsonl"
    with subprocess.Popen([*COMMAND, *words, "2"], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as started:
        wait_for(lambda: sum(len(file.read_text().splitlines()) > 3 for file in run.glob(kept)) == 2)
        kill(started.pid)
    wait_for(lambda: not workers(run))
    assert not (run / "evaluation/test.json").exists()
    # what was found is made wrong, which shows that it is taken: the first example's labels as base sees them
    answers = [json.loads(line) for file in sorted(run.glob(kept)) for line in file.read_text().splitlines()[1:]]
    key = next(key for answer in answers for key in answer if key.startswith("labels/base/"))
    for file in run.glob(kept):
        file.write_text(re.sub(rf'("{key}": )\[[^]]*\]', r"\g<1>[0, 0, 0, 0, 0, 9]", file.read_text()))
    done = mistral_dist(*words, "1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(run.glob(kept)) == []
    found = lines(run / "evaluation/predictions.jsonl")
    index = int(key.rpartition("/")[2])
    assert found[index]["base"] == "transformers"
    before = [json.loads(line) for line in wanted.splitlines()]
    assert [line for n, line in enumerate(found) if n != index] == [line for n, line in enumerate(before) if n != index]


def test_an_evaluation_that_is_stopped_says_how_it_goes_on(trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(run_dir(trained), run)
    words = [*COMMAND, "evaluate", str(run), "evaluate.max_tokens=300", "--processes", "1"]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as started:
        wait_for(lambda: any(len(file.read_text().splitlines()) > 1 for file in run.glob("evaluation/unfinished-*.jsonl")))
        started.send_signal(signal.SIGINT)
        said, _ = started.communicate(timeout=60)
    assert started.returncode == 85, said
    assert "stopped while evaluating base and tuned; what was found is kept: run the same command to go on" in " ".join(said.split())
    assert "error" not in said
    wait_for(lambda: not workers(run))


def test_labels_that_are_written_are_counted_as_such(trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(run_dir(trained), run)
    done = mistral_dist("evaluate", run, "evaluate.method=generation", "--processes", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    test, predictions = json.loads((run / "evaluation/test.json").read_text()), lines(run / "evaluation/predictions.jsonl")
    assert test["method"] == "generation"
    for model in ("base", "tuned"):
        right = sum(line[model] == line["label"] for line in predictions)
        assert test[model]["accuracy"]["value"] == pytest.approx(right / len(predictions), abs=1e-12)
    nothing = [line for line in lines(run / "evaluation/scores.jsonl") if line["base"].casefold() not in test["labels"]]
    assert nothing, "a base of three layers writes no label"
    assert sum(row[-1] for row in test["base"]["confusion_matrix"]) == len(nothing)
    # the likelier way is another question, and may be answered otherwise
    liked = {line["id"]: line["tuned"] for line in lines(run_dir(trained) / "evaluation/predictions.jsonl")}
    assert any(line["tuned"] for line in predictions), "the tuned model writes labels"
    agreed = sum(liked[line["id"]] == line["tuned"] for line in predictions if line["tuned"])
    assert agreed >= 0.9 * sum(line["tuned"] is not None for line in predictions)


def test_rows_of_a_file_are_answered_in_their_order_and_again_after_a_kill(trained: Path, tmp_path: Path) -> None:
    """The labels of the evaluation, for its texts, with a row among them that cannot be asked."""
    run, file, out = run_dir(trained), tmp_path / "texts.jsonl", tmp_path / "out.jsonl"
    evaluated = lines(run / "evaluation/predictions.jsonl")
    texts = {record["id"]: record["text"] for record in read_shards(trained.parent / "data/test")}
    rows: list[dict[str, object]] = [{"text": texts[line["id"]]} for line in evaluated]
    rows.insert(3, {"words": "no text"})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["predict", str(run), str(file), "evaluate.max_tokens=300", "--out", str(out), "--processes"]
    kept = ".out.jsonl-unfinished/unfinished-*.jsonl"
    with subprocess.Popen([*COMMAND, *words, "1"], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as started:
        wait_for(lambda: any(len(one.read_text().splitlines()) > 2 for one in tmp_path.glob(kept)))
        kill(started.pid)
    wait_for(lambda: not workers(run))
    assert not out.exists()
    done = mistral_dist(*words, "2")
    assert done.returncode == 0, done.stdout + done.stderr
    said = " ".join(done.stdout.split())
    assert f"{len(evaluated)} answers; 1 could not be asked, the first is {file}:4: " in said
    answers = lines(out)
    assert answers.pop(3)["error"].startswith(f"{file}:4: ")
    assert [answer["label"] for answer in answers] == [line["tuned"] for line in evaluated]
    assert all(sum(answer["probabilities"].values()) == pytest.approx(1, abs=1e-5) for answer in answers)
    assert not (tmp_path / ".out.jsonl-unfinished").exists()
    done = mistral_dist(*words, "2")
    assert done.returncode == 2
    assert f"{out} is there already" in " ".join(done.stderr.split()), "nothing is written over"
    again = [str(tmp_path / "again.jsonl") if word == str(out) else word for word in words]
    done = mistral_dist(*again, "3")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "again.jsonl").read_bytes() == out.read_bytes(), "the same on any number of ranks"
    file.write_text('{"words": "no text"}\n')
    done = mistral_dist("predict", run, file)
    assert done.returncode == 2
    assert f"{file}:1: " in done.stderr and "can be asked" in done.stderr


def test_what_a_page_asks_the_network_for_is_seen_and_what_it_complains_of(tmp_path: Path) -> None:
    """Else the next test could not fail."""
    page = tmp_path / "page.html"
    page.write_text(
        '<title>{"charts": [], "width": 1, "needed": 1}</title><body><img src="http://127.0.0.1:9/x.png"><script>nothing()</script></body>'
    )
    seen = look(page, tmp_path, 600)
    assert seen.asked == ["http://127.0.0.1:9/x.png"]
    assert "nothing is not defined" in seen.complaints[0]


@pytest.mark.parametrize("width", [1280, 390])
def test_the_report_is_one_page_that_needs_no_network(trained: Path, tmp_path: Path, width: int) -> None:
    run, page = run_dir(trained), tmp_path / "report.html"
    done = mistral_dist("report", run, "--out", page)
    assert done.returncode == 0, done.stderr
    seen = look(page, tmp_path, width)
    assert seen.complaints == []
    assert seen.asked == []
    assert len(seen.charts) == 2 + 5 + 2, "labels, lengths; five curves; measures, confusion"
    assert all(200 < chart <= width for chart in seen.charts), seen.charts
    assert seen.needed <= seen.width <= width, "nothing sticks out"
    test = json.loads((run / "evaluation/test.json").read_text())
    for words in (
        "finished at step 30 of 30",
        "near duplicate",
        f"{test['tuned']['accuracy']['value']:.3f}",
        "Furthest off",
        "rows.jsonl:",
    ):
        assert words in seen.dom


def test_a_run_begins_with_the_adapter_of_an_earlier_one(trained: Path, tmp_path: Path) -> None:
    """Where that ended, and with an optimizer of its own."""
    earlier, run = run_dir(trained), tmp_path / "run"
    words = ["train", trained, f"run.dir={run}", f"model.adapter={earlier}", "train.steps=2", "optim.learning_rate=1e-6", "--processes"]
    done = mistral_dist(*words, "2")
    assert done.returncode == 0, done.stdout + done.stderr
    first, last = lines(run / "metrics.jsonl")[0]["loss"], lines(earlier / "metrics.jsonl")
    assert first < 2 * last[-1]["loss"] < 0.2 * last[0]["loss"]
    saved = {name: load_file(path / "adapter/adapter_model.safetensors") for name, path in (("before", earlier), ("after", run))}
    assert all(torch.allclose(saved["after"][name], tensor, atol=1e-4) for name, tensor in saved["before"].items())
    assert any(not torch.equal(saved["after"][name], tensor) for name, tensor in saved["before"].items())
    shutil.rmtree(run)
    for more, told in (
        (["lora.r=8"], "lora.r is 4 there, the recipe says 8"),
        (["model.name=another/base"], "base_model_name_or_path is test/small there"),
        ([f"model.adapter={tmp_path}"], "no adapter there"),
        (["lora.target_modules=[q_proj]"], "not the adapter of this recipe"),
    ):
        done = mistral_dist(*words, "1", *more)
        assert done.returncode != 0
        assert told in " ".join(done.stderr.split()), done.stdout + done.stderr


def test_runs_are_compared_in_recipe_and_result(trained: Path, tmp_path: Path) -> None:
    first, second = run_dir(trained), tmp_path / "other"
    shutil.copytree(first, second)
    lines_of = lines(second / "evaluation/predictions.jsonl")
    right = [{**line, "tuned": line["label"]} for line in lines_of]
    (second / "evaluation/predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in right))
    recipe = json.loads(json.dumps(yaml.safe_load((second / "recipe.yaml").read_text())))
    recipe["lora"]["r"] = 32
    recipe["run"]["dir"] = str(second)
    (second / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    done = mistral_dist("report", first, second, "--out", tmp_path / "both.html")
    assert done.returncode == 0, done.stderr
    seen = " ".join(re.sub(r"<[^>]*>", " ", (tmp_path / "both.html").read_text().partition("<body>")[2]).split())
    wrong = sum(line["tuned"] != line["label"] for line in lines_of) / len(lines_of)
    assert f"accuracy +{wrong:.3f}, 95 % interval" in seen
    assert ": better (McNemar" in seen
    assert "lora.r 4 32" in seen
    assert "run.dir" not in seen


def test_chat_answers_with_probabilities(trained: Path) -> None:
    text = json.loads((trained.parent / "rows.jsonl").read_text().splitlines()[0])["text"]
    done = mistral_dist("chat", run_dir(trained), "--message", text)
    assert done.returncode == 0, done.stderr
    first = next(line for line in done.stdout.splitlines() if "numpy" in line or "pandas" in line)
    assert "numpy" in first


def test_status_says_how_a_run_stands(trained: Path) -> None:
    done = mistral_dist("status", run_dir(trained))
    assert done.returncode == 0
    for words in ("finished", "30 of 30", "checkpoint-30"):
        assert words in done.stdout


def test_a_changed_recipe_is_refused_with_both_ways_out_and_fresh_starts_anew(trained: Path) -> None:
    run = run_dir(trained)
    done = mistral_dist("train", trained, "optim.learning_rate=0.5")
    assert done.returncode == 2
    for words in ("optim.learning_rate=0.01", "0.5", "run.dir=", "--fresh"):
        assert words in done.stderr
    done = mistral_dist("train", trained, "optim.learning_rate=0.5", "train.steps=1", "--fresh", "--processes", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (run.with_name("flow.old-1") / "adapter").is_dir()
    assert status(run)["steps"] == 1
    # back in place for the tests after this one
    subprocess.run(["rm", "-r", str(run)], check=True)
    run.with_name("flow.old-1").rename(run)


@pytest.mark.parametrize(
    ("kind", "row"),
    [
        ("chat", {"messages": [{"role": "user", "content": "Count: {n}"}, {"role": "assistant", "content": "{n} is a number."}]}),
        pytest.param("instruct", {"prompt": "Say {n}", "completion": "{n}!"}, marks=pytest.mark.matrix),
        ("pretrain", {"text": "Chapter {n}. In the beginning of part {n} there was a word, and then another."}),
    ],
)
def test_the_other_tasks_train_and_are_measured_by_their_loss(write_recipe: WriteRecipe, kind: str, row: dict[str, object]) -> None:
    rows = [json.loads(json.dumps(row).replace("{n}", str(n))) for n in range(80)]
    recipe = write_recipe(
        rows=rows,
        task={"kind": kind, "labels": [], "prompt": "{text}", "system": None},
        train={"steps": 4, "global_batch_size": 2},
        model={"dtype": "bfloat16"},
        lora={"init_lora_weights": True},
    )
    done = mistral_dist("train", recipe, "--processes", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    done = mistral_dist("evaluate", run_dir(recipe), "evaluate.max_new_tokens=8", "--processes", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    test = json.loads((run_dir(recipe) / "evaluation/test.json").read_text())
    assert test["n"] == 8
    assert test["tuned"]["loss"]["value"] < test["base"]["loss"]["value"]
    assert test["difference"]["loss"]["value"] == pytest.approx(test["tuned"]["loss"]["value"] - test["base"]["loss"]["value"])
    predictions = lines(run_dir(recipe) / "evaluation/predictions.jsonl")
    if kind == "pretrain":
        assert predictions == []
    else:
        assert len(predictions) == test["tuned"]["written"]["n"] == 8
        assert all(line["reference"] and isinstance(line["tuned"], str) for line in predictions)
        assert test["tuned"]["written"]["stop_rate"]["value"] == sum(line["tuned_ended"] for line in predictions) / 8
    done = mistral_dist("report", run_dir(recipe))
    assert done.returncode == 0, done.stdout + done.stderr
    page = (run_dir(recipe) / "report.html").read_text().partition("<body>")[2]
    assert f"{test['tuned']['loss']['value']:.3f}" in page and "Furthest off" in page
    assert ("What it writes" in page) == (kind != "pretrain")
    done = mistral_dist("chat", run_dir(recipe), "--message", "Say 5")
    assert done.returncode == 0, done.stderr
    assert "base:" in done.stdout and "tuned:" in done.stdout
    asked = (
        {"messages": [{"role": "user", "content": "Say 5"}]}
        if kind == "chat"
        else {"prompt": "Say 5"}
        if kind == "instruct"
        else {"text": "Say"}
    )
    (run_dir(recipe) / "ask.jsonl").write_text(json.dumps(asked) + "\n")
    words = ["evaluate.max_new_tokens=8", "--out", run_dir(recipe) / "said.jsonl", "--processes", "1"]
    done = mistral_dist("predict", run_dir(recipe), run_dir(recipe) / "ask.jsonl", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = lines(run_dir(recipe) / "said.jsonl")
    assert isinstance(line["answer"], str) and line["ended"] in (True, False)


def test_debug_mode_takes_twenty_steps_in_a_run_of_its_own_and_looks_at_them(write_recipe: WriteRecipe) -> None:
    """Twice: the second removes what the first left, and the user's run is never touched."""
    recipe = write_recipe(model={"dtype": "bfloat16"}, lora={"init_lora_weights": True}, train={"global_batch_size": 2})
    run = run_dir(recipe)
    run.mkdir(parents=True)
    (run / "mine").touch()
    debug = run.with_name(f"{run.name}-debug")
    debug.mkdir()
    (debug / "debug.jsonl").touch()
    (debug / "of the last time").touch()
    done = subprocess.run(
        [str(ROOT / "launch/debug.sh"), str(recipe)], capture_output=True, text=True, check=False, cwd=ROOT, env=with_command()
    )
    assert done.returncode == 0, done.stdout + done.stderr
    said = done.stdout.splitlines()
    assert said[-1] == "single-GPU checks passed; NCCL not tested"
    assert "   ok  resume: from checkpoint-10 in another process: the same adapter, moments, metrics and data order" in done.stdout
    assert any(line.strip().startswith("⟦") for line in said), "targets are marked"
    assert [path.name for path in run.iterdir()] == ["mine"]
    assert f"in {debug}, which the next debug start removes" in said[0]
    assert not (debug / "of the last time").exists()
    assert status(debug)["step"] == status(debug / "resumed")["step"] == 20


def with_command() -> dict[str, str]:
    """An environment in which `mistral-dist` is found, as after activating the virtual environment."""
    import os

    return {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def test_a_stream_trains_and_is_measured_on_what_was_held_out(
    write_recipe: WriteRecipe, tmp_path: Path, texts: list[dict[str, str]]
) -> None:
    (tmp_path / "held-out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts[:20]))
    sources = [{"path": str(tmp_path / "small.jsonl")}, {"path": str(tmp_path / "held-out.jsonl"), "into": "test"}]
    recipe = write_recipe(rows=texts[20:], data={"sources": sources, "streaming": True}, train={"steps": 3, "global_batch_size": 2})
    done = mistral_dist("train", recipe, "--processes", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    done = mistral_dist("evaluate", run_dir(recipe), "--processes", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((run_dir(recipe) / "evaluation/test.json").read_text())["n"] == 20
