"""Validation in real runs: it changes nothing, shows the same on any ranks, and decides the same through stops and kills."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mistral_dist.config import Recipe
from mistral_dist.data.shards import read_shards
from mistral_dist.optim import lr_at
from tests import faults
from tests.conftest import WriteRecipe
from tests.dist.test_options import Plain
from tests.dist.test_resume import ADAPTER, assert_nobody_left, assert_same_run
from tests.launch import kill, losses, metrics, mistral_dist, run_dir, status, train, training, validations, wait_for

EVERY_STEP = "train.eval_steps=1"
NOISY = ["model.dtype=bfloat16", "lora.lora_dropout=0.3", "train.gradient_checkpointing=true"]


@pytest.fixture(scope="module")
def recipe(recipe_writer: Callable[[Path], WriteRecipe], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps of four packs, two checkpoints, prepared; no validation unless a test asks for it."""
    write = recipe_writer(tmp_path_factory.mktemp("validation"))
    recipe = write(train={"steps": 6, "global_batch_size": 4}, checkpoint={"save_steps": 3})
    assert mistral_dist("prepare", recipe).returncode == 0
    return recipe


@pytest.mark.parametrize("zero", [pytest.param(zero, marks=pytest.mark.matrix) if zero < 3 else zero for zero in (0, 1, 2, 3)])
@pytest.mark.fault("a validation between any two steps", "changes nothing: the same bits of adapter, optimizer, metrics, data order")
def test_a_validation_changes_nothing(zero: int, recipe: Path, tmp_path: Path) -> None:
    """With dropout and recomputed layers. Killed and gone on with: the first act of that launch is a validation."""
    never = train(recipe, tmp_path / "never", *NOISY, zero=zero)
    often = tmp_path / "often"
    slowly = faults.environment(slow={"0": 1.0, "1": 1.0})  # the writer has time
    with training(recipe, often, *NOISY, "train.eval_steps=2", until=4, zero=zero, **slowly) as started:
        wait_for((often / "checkpoints" / "checkpoint-3").is_dir, started)
        kill(started.pid)
        assert_nobody_left(often)
    train(recipe, often, *NOISY, EVERY_STEP, zero=zero)
    assert "going on from checkpoint-3" in (often / "log.txt").read_text()
    assert list(validations(often)) == [2, 3, 4, 5, 6]
    assert len({found["loss"] for found in validations(often).values()}) == 5
    assert [entry for entry in metrics(often) if "eval" not in entry] == metrics(never)
    last = "checkpoints/checkpoint-6"
    for file in (ADAPTER, f"{last}/{ADAPTER}", f"{last}/optimizer.safetensors", "adapter/adapter_config.json", "data_order.jsonl"):
        assert (often / file).read_bytes() == (never / file).read_bytes(), file


def test_the_loss_is_that_of_plain_peft_however_it_is_shared_out(recipe: Path, tmp_path: Path) -> None:
    """One adapter, trained with weights and smoothing, which a validation knows nothing of; scored by each in turn."""
    overrides = ["task.class_weights={numpy: 4.0}", "train.label_smoothing_factor=0.1"]
    trained = train(recipe, tmp_path / "trained", *overrides, processes=1, zero=0)
    ids = list(read_shards(Recipe.load(recipe).data_dir / "validation")["id"])
    plain = Plain(Recipe.load(recipe), trained / "adapter").loss(ids)
    found = {}
    for processes, zero, micro in [(1, 0, 2), (2, 0, 1), (2, 2, 1), (3, 3, 2)]:
        run = tmp_path / f"{processes}-{zero}"
        shutil.copytree(trained, run)
        (run / "status.json").unlink()  # else there were nothing to do
        train(recipe, run, *overrides, EVERY_STEP, f"train.micro_batch_size={micro}", processes=processes, zero=zero)
        assert list(validations(run)) == [6]
        assert (run / ADAPTER).read_bytes() == (trained / ADAPTER).read_bytes()
        found[f"ZeRO-{zero} x {processes}"] = validations(run)[6]
    alone = found["ZeRO-0 x 1"]
    assert alone["examples"] == len(ids) > 20
    assert alone["loss"] == pytest.approx(plain, rel=1e-6)
    for name, other in found.items():
        print(f"{name}: {other['loss']:.9f}, plain PEFT {plain:.9f}")
        assert other == alone, "every forward and the sum to the last bit"


def test_a_stream_is_validated_on_its_own_source_though_it_has_fewer_examples_than_ranks(
    write_recipe: WriteRecipe, texts: list[dict[str, str]], tmp_path: Path
) -> None:
    (tmp_path / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts[:2]))
    sources = [{"path": str(tmp_path / "small.jsonl")}, {"path": str(tmp_path / "validation.jsonl"), "into": "validation"}]
    recipe = write_recipe(rows=texts[2:], data={"sources": sources, "streaming": True}, train={"steps": 2, "eval_steps": 1})
    run = train(recipe, tmp_path / "run", processes=3, zero=3)
    found = validations(run)
    assert list(found) == [1, 2]
    assert {entry["examples"] for entry in found.values()} == {2}
    ids = list(read_shards(Recipe.load(recipe).data_dir / "validation")["id"])
    assert found[2]["loss"] == pytest.approx(Plain(Recipe.load(recipe), run / "adapter").loss(ids), rel=1e-6)


# what it decides

DECIDES = [
    "train.epochs=9",
    "train.steps=40",
    "train.eval_steps=2",
    "train.early_stopping_patience=2",
    "train.load_best_model_at_end=true",
    "train.max_rewinds=0",  # so that no checkpoint is kept to go back to
    "optim.learning_rate=8e-2",
    "optim.warmup_ratio=0",
    "checkpoint.save_steps=5",
    "checkpoint.save_total_limit=1",
]


@pytest.fixture(scope="module")
def never_stopped(recipe: Path) -> Path:
    """A run that learns too fast, which the validations end."""
    return train(recipe, recipe.parent / "never-stopped", *DECIDES)


def step_of_end(run: Path) -> tuple[int, int]:
    """(last step, best step) of a run that the validations have ended, as they say themselves."""
    found = validations(run)
    last = max(found)
    best = min(found, key=lambda step: found[step]["loss"])
    assert last - best == 2 * 2, "two validations later"
    assert found[last]["best_step"] == best
    return last, best


def test_the_validations_end_a_run_and_choose_its_result(recipe: Path, never_stopped: Path) -> None:
    last, best = step_of_end(never_stopped)
    loss = validations(never_stopped)[best]["loss"]
    ended = status(never_stopped)
    assert (ended["state"], ended["exit_code"], ended["step"], ended["steps"]) == ("finished", 0, last, 40)
    message = f"finished early at step {last} of 40, after 2 validations in a row that did not improve"
    assert ended["message"] == f"{message}; the adapter is that of step {best}, the best validation (loss {loss:.4f})"
    assert len(losses(never_stopped)) == last < 40
    rates = [entry["learning_rate"] for entry in metrics(never_stopped) if "eval" not in entry]
    optim = Recipe.load(recipe, DECIDES).optim
    assert rates == [lr_at(step, 40, optim) for step in range(last)], "of the steps that were planned"
    checkpoints = {path.name for path in (never_stopped / "checkpoints").iterdir()}
    assert checkpoints == {f"checkpoint-{step}" for step in (best, last - last % 5, last)}, "the best, that of save_steps, the newest"
    assert (never_stopped / ADAPTER).read_bytes() == (never_stopped / f"checkpoints/checkpoint-{best}" / ADAPTER).read_bytes()
    assert f"trained by mistral-dist for {best} steps" in (never_stopped / "adapter/README.md").read_text()
    done = mistral_dist("train", recipe, f"run.dir={never_stopped}", *DECIDES)
    assert done.returncode == 0
    assert f"at step {last} of 40" in done.stdout and "nothing to do" in done.stdout


@pytest.mark.matrix
@pytest.mark.fault(
    "a stop signal within a validation; SIGKILL between one and its checkpoint",
    "taken again, to the same loss, noted once; the run ends at the same step with the same bits",
    zero=(2,),
)
def test_through_a_stop_and_a_kill_the_validations_decide_the_same(recipe: Path, never_stopped: Path, tmp_path: Path) -> None:
    last, best = step_of_end(never_stopped)
    run = tmp_path / "run"
    words = ["train", recipe, f"run.dir={run}", *DECIDES, "--processes", "2", "--zero", "2"]
    done = mistral_dist(*words, **faults.environment(stop_in_validation=[best, 2]))
    assert done.returncode == 85, done.stdout + done.stderr
    assert_nobody_left(run)
    assert (status(run)["step"], status(run)["checkpoint"]) == (best, f"checkpoint-{best}")
    assert re.search(rf"left off at step {best}, batch \d, validation", (run / "log.txt").read_text())
    assert best not in validations(run)

    # of the two validations of this launch no checkpoint knows anything
    done = mistral_dist(*words, **faults.environment(kill_after_validation=best + 2))
    assert done.returncode == 1, done.stdout + done.stderr
    assert_nobody_left(run)
    assert list(validations(run))[-2:] == [best, best + 2]

    train(recipe, run, *DECIDES)
    assert_same_run(run, never_stopped, last=last)
    assert status(run)["message"] == status(never_stopped)["message"]

    # as if killed before it could say that it is finished
    (run / "status.json").unlink()
    train(recipe, run, *DECIDES)
    assert_same_run(run, never_stopped, last=last)
    assert status(run)["message"] == status(never_stopped)["message"]


@pytest.mark.matrix
@pytest.mark.fault("a rank that hangs within a validation", "named with step and batch, all end", zero=(2,))
def test_a_rank_that_hangs_within_a_validation_is_named(recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ["train", recipe, f"run.dir={run}", EVERY_STEP, "train.stall_seconds=8", "--processes", "2", "--zero", "2"]
    done = mistral_dist(*words, **faults.environment(hang_in_validation=[2, 3]))
    assert done.returncode == 1, done.stdout + done.stderr
    assert_nobody_left(run)
    assert re.search(r"rank 1 \(process \d+ on \S+\) has not moved for \d+ s: step 2, batch 3, validation", status(run)["message"])
    train(recipe, run, EVERY_STEP)
    assert list(validations(run)) == [1, 2, 3, 4, 5, 6]


def test_without_validation_examples_it_is_refused_before_a_model_is_loaded(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    recipe = write_recipe(data={"validation_fraction": 0.0}, train={"steps": 2})
    assert mistral_dist("prepare", recipe).returncode == 0
    done = mistral_dist("train", recipe, EVERY_STEP)
    assert done.returncode == 2
    assert "train.eval_steps: there are no validation examples: data.validation_fraction=0" in " ".join(done.stderr.split())
    assert not run_dir(recipe).exists()
