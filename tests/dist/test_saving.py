"""Saving in a real run: killed inside a save at every point, and on a disk that fills up."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import faults
from tests.conftest import WriteRecipe
from tests.dist.test_resume import assert_nobody_left, assert_same_run, never_killed, recipe  # noqa: F401 - fixtures
from tests.launch import STAGES, fill, lines, mistral_dist, resume, small_disk, status, train, training, wait_for

POINTS = {
    # what a checkpoint that was being written has left: (files aside, is the new one there)
    "before the folder": (False, False),
    "inside a tensor file": (True, False),
    "before the manifest": (True, False),
    "before the rename": (True, False),
    "after the rename": (False, True),
}


def names(run: Path) -> set[str]:
    return {re.sub(r"-[0-9a-f]{8}$", "", path.name) for path in (run / "checkpoints").iterdir()}


@pytest.mark.matrix
@pytest.mark.parametrize("zero", STAGES)
@pytest.mark.fault("SIGKILL inside a save: five points of it", "the newest whole checkpoint is used; the same bits")
def test_killed_inside_a_save_it_uses_what_is_whole(
    zero: int,
    recipe: Path,  # noqa: F811 - fixtures
    never_killed: Callable[[int], Path],  # noqa: F811
    tmp_path: Path,
) -> None:
    """Five kills in one run, each while checkpoint-15 is written; the first launch has made checkpoint-5 and -10."""
    run = tmp_path / "run"
    for point, (is_aside, is_there) in POINTS.items():
        armed = faults.environment(kill_in_save=[point, 15])
        done = mistral_dist("train", recipe, f"run.dir={run}", "--processes", "2", "--zero", str(zero), **armed)
        assert done.returncode == 1, (point, done.stdout + done.stderr)
        assert_nobody_left(run)
        left = {".aside-checkpoint-15"} if is_aside else set()
        # after the rename and before the old ones are dropped there is one more than are kept
        assert names(run) == {"checkpoint-5", "checkpoint-10"} | left | ({"checkpoint-15"} if is_there else set()), point
    train(recipe, run, zero=zero)
    log = (run / "log.txt").read_text()
    assert re.findall(r"going on from (checkpoint-\d+)", log) == ["checkpoint-10"] * 4 + ["checkpoint-15"]
    assert "damaged" not in log
    # the last two, and one that the guards could go back to
    assert names(run) == {"checkpoint-10", "checkpoint-15", "checkpoint-20"}
    assert_same_run(run, never_killed(zero))


@pytest.mark.matrix
@pytest.mark.parametrize("zero", STAGES)
@pytest.mark.fault("a full disk", "the training goes on, and saves when there is room; only the last save must succeed")
def test_a_full_disk_does_not_end_the_training_until_the_last_moment(zero: int, write_recipe: WriteRecipe, tmp_path: Path) -> None:
    steps, every = 60, 4
    recipe = write_recipe(  # noqa: F811 - another recipe
        train={"epochs": 4, "steps": steps, "global_batch_size": 4, "max_rewinds": 0},
        checkpoint={"save_steps": every, "save_total_limit": 1},
    )
    assert mistral_dist("prepare", recipe).returncode == 0
    with small_disk(tmp_path / "disk", "16m") as disk:
        run = disk / "run"
        with training(recipe, run, until=every + 1, zero=zero) as started:
            filler = fill(disk)
            wait_for(lambda: "could not be saved" in status(run)["message"], started)
            told = status(run)
            assert told["state"] == "running"
            assert re.search(
                r"checkpoint-\d+ could not be saved: No space left on device \(it needs [\d,]+ bytes, [\d,]+ are free\)", told["message"]
            )
            # it goes on, and saves again, while the disk stays full
            wait_for(lambda: status(run)["step"] > told["step"] + every, started)
            assert list((run / "checkpoints").glob(".aside-*")) == []
            assert status(run)["checkpoint"] == told["checkpoint"]
            filler.unlink()
            wait_for(lambda: status(run)["checkpoint"] != told["checkpoint"], started)
            assert "could not" not in status(run)["message"]
            # and once more, to the end
            last = status(run)["checkpoint"]
            filler = fill(disk)
            assert started.wait(300) == 2
        ended = status(run)
        assert (ended["state"], ended["exit_code"]) == ("failed", 2)
        kept = max((run / "checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
        assert int(kept.name.split("-")[1]) >= int(last.split("-")[1])
        message = ended["message"]
        assert f"checkpoint-{steps} could not be saved: No space left on device (it needs " in message
        assert f"make room there, or make it writable, and run the same command again: it goes on from {kept.name}" in message
        assert names(run) == {kept.name}, "what was there is untouched, and nothing is half written"
        filler.unlink()

        resume(recipe, run, zero=zero)
        for file in ("metrics.jsonl", "data_order.jsonl"):
            assert [entry["step"] for entry in lines(run / file)] == list(range(1, steps + 1)), "each step once, in order"
        straight = train(recipe, tmp_path / "straight", zero=zero)
        assert lines(run / "data_order.jsonl") == lines(straight / "data_order.jsonl")
        assert (run / "adapter/adapter_model.safetensors").read_bytes() == (straight / "adapter/adapter_model.safetensors").read_bytes()
