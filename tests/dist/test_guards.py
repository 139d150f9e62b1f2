"""Guards in a real run: what is not finite changes nothing, what spoils the adapter is gone back from and passed over."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests import faults
from tests.conftest import WriteRecipe
from tests.dist.test_resume import ADAPTER, assert_same_run
from tests.launch import kill, lines, losses, mistral_dist, resume, status, train, training, validations, wait_for, workers

TOPOLOGIES = [
    pytest.param(1, 0, id="one process", marks=pytest.mark.matrix),
    pytest.param(2, 0, id="data parallel x 2", marks=pytest.mark.matrix),
    pytest.param(2, 1, id="ZeRO-1 x 2", marks=pytest.mark.matrix),
    pytest.param(2, 2, id="ZeRO-2 x 2"),
    pytest.param(2, 3, id="ZeRO-3 x 2", marks=pytest.mark.matrix),
    pytest.param(2, "2+offload", id="ZeRO-2 x 2 with offload", marks=pytest.mark.matrix),
    pytest.param(2, "3+offload", id="ZeRO-3 x 2 with offload", marks=pytest.mark.matrix),
]


VALIDATED = ("train.eval_steps=9", "train.load_best_model_at_end=true")


def steps_of(run: Path, file: str) -> list[int]:
    return [entry["step"] for entry in lines(run / file)]


@pytest.mark.parametrize(("processes", "zero"), TOPOLOGIES)
@pytest.mark.fault("a loss or a gradient that is NaN or infinite, on one rank", "no rank updates anything; the examples are named")
def test_a_step_that_is_not_finite_changes_nothing_on_any_rank(
    processes: int, zero: int | str, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    """NaN on one slot, an infinite loss with a finite gradient on another, and the other way about: skipped alike, named; the run goes on.

    Which examples make a gradient infinite cannot be told: all of the step's are named.
    """
    recipe = write_recipe(train={"steps": 9, "global_batch_size": 4}, checkpoint={"save_steps": 1, "save_total_limit": 9})
    assert mistral_dist("prepare", recipe).returncode == 0
    spoiled = faults.environment(nan_loss=[[3, 1]], infinite_loss=[[6, 2]], infinite_gradient=[[8, 1]])
    run = train(recipe, tmp_path / "run", processes=processes, zero=zero, **spoiled)

    order = {entry["step"]: entry["ids"] for entry in lines(run / "data_order.jsonl")}
    untrained = lines(run / "untrained.jsonl")
    because = {3: "the loss is not finite", 6: "the loss is not finite", 8: "the gradient is not finite"}
    assert [(entry["step"], entry["because"]) for entry in untrained] == list(because.items())
    for entry in untrained:
        assert entry["ids"] == order[entry["step"]]
    assert sorted(untrained[-1]["suspects"]) == sorted(untrained[-1]["ids"])
    for entry in untrained[:-1]:
        assert 0 < len(entry["suspects"]) < len(entry["ids"]), "those of one slot"
        assert set(entry["suspects"]) < set(entry["ids"])
    assert steps_of(run, "metrics.jsonl") == list(range(1, 10))
    assert [entry["step"] for entry in lines(run / "metrics.jsonl") if entry["loss"] is None] == list(because)

    def state(step: int) -> list[bytes]:
        folder = run / "checkpoints" / f"checkpoint-{step}"
        return [(folder / file).read_bytes() for file in (ADAPTER, "optimizer.safetensors")]

    for before, after, is_equal in [(2, 3, True), (5, 6, True), (7, 8, True), (3, 4, False), (6, 7, False), (8, 9, False)]:
        assert (state(before) == state(after)) == is_equal, (before, after)


@pytest.mark.parametrize(("processes", "zero"), TOPOLOGIES)
@pytest.mark.fault("a loss that is NaN in the very first step", "saved as it is; the next step is trained")
def test_a_run_is_saved_before_its_first_update(processes: int, zero: int | str, write_recipe: WriteRecipe, tmp_path: Path) -> None:
    recipe = write_recipe(train={"steps": 2, "global_batch_size": 4}, checkpoint={"save_steps": 1})
    assert mistral_dist("prepare", recipe).returncode == 0
    run = train(recipe, tmp_path / "run", processes=processes, zero=zero, **faults.environment(nan_loss=[[1, 0]]))
    assert steps_of(run, "untrained.jsonl") == [1]
    moments = [load_file(run / "checkpoints" / f"checkpoint-{step}" / "optimizer.safetensors") for step in (1, 2)]
    assert [any(moment.any() for moment in found.values()) for found in moments] == [False, True]


IN_A_ROW = "the loss or the gradient was not finite in 3 steps in a row"


@pytest.mark.matrix
@pytest.mark.fault(
    "a loss that is NaN in three steps in a row", "back to a checkpoint from before; a kill after it: the same bits", zero=(2,)
)
def test_three_bad_steps_in_a_row_are_gone_back_from(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    """With five steps before them, which may have spoiled the adapter; killed on the way after it, the run ends with the same bits."""
    recipe = write_recipe(train={"steps": 20, "global_batch_size": 4}, checkpoint={"save_steps": 5})
    assert mistral_dist("prepare", recipe).returncode == 0
    spoiled = faults.environment(nan_loss=[[12, 1], [13, 1], [14, 1]])
    run = train(recipe, tmp_path / "run", **spoiled)
    told = f"step 14: {IN_A_ROW}; back to checkpoint-5, steps 7 to 14 will be passed over"
    assert (run / "log.txt").read_text().count(told) == 1
    assert steps_of(run, "untrained.jsonl") == list(range(7, 15))
    assert steps_of(run, "metrics.jsonl") == list(range(1, 21))
    assert [loss is None for loss in losses(run)] == [7 <= step <= 14 for step in range(1, 21)]
    assert steps_of(run, "data_order.jsonl") == [step for step in range(1, 21) if not 7 <= step <= 14]

    killed = tmp_path / "killed"
    with training(recipe, killed, until=16, **spoiled) as started:
        kill(started.pid)
        wait_for(lambda: not workers(killed))
    resume(recipe, killed, **spoiled)
    assert_same_run(killed, run)
    assert lines(killed / "untrained.jsonl") == lines(run / "untrained.jsonl")


@pytest.mark.fault("a loss that is NaN in the first three steps", "fails with the diagnosis, exit code 1", zero=(0,))
def test_three_bad_steps_before_the_first_checkpoint_fail_with_a_diagnosis(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    recipe, run = write_recipe(train={"steps": 8, "global_batch_size": 4}), tmp_path / "run"
    assert mistral_dist("prepare", recipe).returncode == 0
    spoiled = faults.environment(nan_loss=[[1, 1], [2, 1], [3, 1]])
    done = mistral_dist("train", recipe, f"run.dir={run}", "--processes", "1", **spoiled)
    assert done.returncode == 1, done.stdout + done.stderr
    ended = status(run)
    assert (ended["state"], ended["exit_code"]) == ("failed", 1)
    assert f"step 3: {IN_A_ROW}, and there is no checkpoint from before; start another run" in ended["message"]


@pytest.fixture(scope="module")
def long_recipe(recipe_writer: "object", tmp_path_factory: pytest.TempPathFactory) -> Path:
    """75 steps, a checkpoint every tenth."""
    write = recipe_writer(tmp_path_factory.mktemp("guards"))  # type: ignore[operator]
    recipe: Path = write(train={"steps": 75, "epochs": 9, "global_batch_size": 2}, checkpoint={"save_steps": 10})
    assert mistral_dist("prepare", recipe).returncode == 0
    return recipe


@pytest.mark.parametrize(("processes", "zero"), TOPOLOGIES)
@pytest.mark.fault("an update that spoils the adapter", "back to a checkpoint from before; the steps that led to it are passed over")
def test_a_spoiled_adapter_is_gone_back_from(processes: int, zero: int | str, long_recipe: Path, tmp_path: Path) -> None:
    """One update of a huge learning rate; killed on the way after it, the run ends with the same bits.

    What a validation saw of the spoiled adapter is forgotten, and where nothing was trained since the last one there is none.
    """
    spoiled = faults.environment(huge_rate=[59])
    run = train(long_recipe, tmp_path / "run", *VALIDATED, processes=processes, zero=zero, **spoiled)
    log = (run / "log.txt").read_text()
    assert "the loss was" in log
    assert "back to checkpoint-54, steps 55 to 64 will be passed over" in log, "saved since its validation was the best"
    assert steps_of(run, "untrained.jsonl") == list(range(55, 65))
    assert len(losses(run)) == 75
    assert "step 63/75  validation loss" in log, "of the spoiled adapter"
    assert list(validations(run)) == [9, 18, 27, 36, 45, 54, 72, 75]
    assert all(found["loss"] < 2 * validations(run)[9]["loss"] for found in validations(run).values())
    assert f"the adapter is that of step {validations(run)[75]['best_step']}" in status(run)["message"]
    assert steps_of(run, "data_order.jsonl") == [step for step in range(1, 76) if not 55 <= step < 65]
    well = [loss for loss in losses(run) if loss is not None]
    assert max(well[-10:]) < 2 * max(well[:10])

    killed = tmp_path / "killed"
    with training(long_recipe, killed, *VALIDATED, until=66, processes=processes, zero=zero, **spoiled) as started:
        kill(started.pid)
        wait_for(lambda: not workers(killed))
    resume(long_recipe, killed, *VALIDATED, processes=processes, zero=zero, **spoiled)
    assert_same_run(killed, run, last=75)


@pytest.mark.fault("an adapter that is spoiled again", "fails with the diagnosis, exit code 1", zero=(0,))
def test_a_run_that_is_spoiled_again_fails_with_a_diagnosis(long_recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ["train", long_recipe, f"run.dir={run}", "train.max_rewinds=1", "--processes", "1"]
    done = mistral_dist(*words, **faults.environment(huge_rate=[59, 66]))
    assert done.returncode == 1, done.stdout + done.stderr
    assert "the run went back once already (train.max_rewinds)" in status(run)["message"]
    assert "optim.learning_rate" in status(run)["message"]


def test_a_run_without_trouble_is_left_alone(long_recipe: Path, tmp_path: Path) -> None:
    run = train(long_recipe, tmp_path / "run", processes=1, zero=0)
    assert not (run / "untrained.jsonl").exists()
    assert None not in losses(run)
