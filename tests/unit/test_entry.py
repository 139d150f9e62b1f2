"""A rank's way out of a run directory: why it failed is noted, whatever stands in the way of it."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from threading import Timer
from types import SimpleNamespace
from typing import Any

import pytest

from mistral_dist import train, workflow
from mistral_dist.config import Checkpoint, Recipe
from mistral_dist.entry import open_run
from mistral_dist.errors import DataError, MachineError, RecipeError, RunError, TrainingError
from mistral_dist.run import Lease, RunDirectory
from mistral_dist.runtime.causes import cause, seen_from_here
from mistral_dist.runtime.nodes import Nodes
from mistral_dist.runtime.process import StopRequest
from mistral_dist.saver import Saver
from mistral_dist.topology import Topology
from tests.conftest import WriteRecipe
from tests.unit.test_checkpoint import snapshot
from tests.unit.test_run import RECIPE, foreign


def nothing(*_: object, **__: object) -> None:
    """An action without effect."""


def rank(watch: Callable[..., None] = nothing) -> Any:
    """A group of one rank."""
    return SimpleNamespace(on_main=lambda action: action(), watch=watch, explain=lambda error: error)


def second(token: str) -> Any:
    """The second rank of a group that holds a lease with this token."""
    outcomes = iter([token, None])
    return SimpleNamespace(on_main=lambda _: next(outcomes), watch=nothing, explain=lambda error: error)


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def too_many(*_: object) -> None:
    raise RecipeError("too many ranks")


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path / "run")


@pytest.fixture
def recipe(tmp_path: Path, run: RunDirectory) -> Recipe:
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE)
    return Recipe.load(path, [f"run.dir={run.path}"])


def told(run: RunDirectory) -> tuple[str, int, str]:
    status = run.status() or {}
    return status["state"], status["exit_code"], status["message"]


def test_a_run_that_cannot_be_held_for_want_of_room_says_so(run: RunDirectory, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", full)
    with pytest.raises(MachineError), open_run(recipe, rank()):
        pass
    state, code, message = told(run)
    assert (state, code) == ("failed", 2)
    for words in (str(run.path), "No space left on device", "bytes are free", "make room", "run the same command again"):
        assert words in message
    assert [path.name for path in run.path.iterdir()] == ["status.json"]


def test_what_fails_before_the_training_begins_is_noted(run: RunDirectory, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OSError, match="No space"), open_run(recipe, rank(watch=full)):
        pass
    assert told(run) == ("failed", 1, "OSError: [Errno 28] No space left on device")
    run.set_status("stopped", 85, "stopped")
    monkeypatch.setattr(RunDirectory, "begin", full)
    with pytest.raises(OSError, match="No space"), open_run(recipe, rank()):
        pass
    assert told(run)[0] == "failed"


def test_where_another_holds_the_run_nothing_is_noted(run: RunDirectory, recipe: Recipe) -> None:
    with Lease(run):
        run.set_status("running", None, "training")
        with pytest.raises(RunError, match="in use by"), open_run(recipe, rank()):
            pass
    assert (run.status() or {})["message"] == "training"


def test_an_end_that_cannot_be_written_is_told_with_the_remedy(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where not even the status has room, the launcher meets the same full disk."""
    monkeypatch.setattr(run, "set_status", full)
    with pytest.raises(MachineError, match=r"No space left on device .*bytes are free.*make room"):
        workflow._ended(run, run.log, 1, None, 1.0, None)


def test_a_damaged_status_does_not_hide_what_went_wrong(run: RunDirectory, recipe: Recipe) -> None:
    run.path.mkdir()
    (run.path / "status.json").write_text("{")
    with pytest.raises(DataError, match="no JSON"), open_run(recipe, rank()):
        raise DataError("x.jsonl:7: no JSON")


def test_a_rank_that_cannot_join_says_why_where_the_lease_is_damaged(
    run: RunDirectory, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "Runtime", too_many)
    run.path.mkdir()
    (run.path / "lease.json").write_text("{")
    with pytest.raises(RecipeError, match="too many ranks"):
        train.join(recipe, StopRequest())
    assert run.status() is None, "it may be held by another"


def test_a_finished_run_is_not_failed_by_ranks_that_cannot_join(run: RunDirectory, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "Runtime", too_many)
    for before, after in (("stopped", "failed"), ("finished", "finished")):
        run.set_status(before, None, "")  # type: ignore[arg-type]
        with pytest.raises(RecipeError, match="too many ranks"):
            train.join(recipe, StopRequest())
        assert (run.status() or {})["state"] == after


def test_a_rank_without_the_lease_writes_nothing_where_another_group_has_taken_over(run: RunDirectory, recipe: Recipe) -> None:
    with pytest.raises(DataError), open_run(recipe, second("mine")):
        raise DataError("written")
    foreign(run, 0)
    with pytest.raises(DataError), open_run(recipe, second("mine")):
        raise DataError("too late")
    assert told(run) == ("failed", 2, "written")
    with pytest.raises(DataError), open_run(recipe, second("t")):
        raise DataError("of the holder's group")
    assert told(run) == ("failed", 2, "of the holder's group")


@pytest.mark.parametrize("peer", [False, True])
def test_a_failure_names_the_checkpoint_that_was_written_meanwhile(run: RunDirectory, recipe: Recipe, peer: bool) -> None:
    with pytest.raises(OSError, match="Connection"), open_run(recipe, rank()) as held:
        fail_while_saving(held, peer)
    assert told(run) == (("failed", 2, "x.jsonl:7: no JSON") if peer else ("failed", 1, "OSError: Connection closed by peer"))
    status = run.status() or {}
    assert (status["step"], status["checkpoint"]) == (5, "checkpoint-5")


def test_the_failure_of_an_older_launch_is_not_told_anew(run: RunDirectory, recipe: Recipe) -> None:
    run.set_status("failed", 2, "x.jsonl:7: no JSON", step=5, checkpoint="checkpoint-5")
    before = run.status()
    with pytest.raises(OSError, match="Connection"), open_run(recipe, rank()) as held:
        fail_while_loading(held)
    assert run.status() == before


@pytest.mark.parametrize(
    ("before", "noted", "wanted"),
    [
        (None, None, ("failed", 1, "rank 1 hangs")),
        ("failed", None, ("failed", 1, "rank 1 hangs")),  # of the launch before: this one has not begun to train
        ("stopped", None, ("failed", 1, "rank 1 hangs")),
        ("failed", "failed", ("failed", 2, "no memory")),
        (None, "failed", ("failed", 2, "no memory")),
        ("failed", "running", ("failed", 1, "rank 1 hangs")),
        (None, "stopped", ("stopped", 2, "no memory")),
        (None, "finished", ("finished", 2, "no memory")),
        ("finished", None, ("finished", 2, "before")),
    ],
)
def test_the_watch_leaves_what_this_launch_has_noted(
    run: RunDirectory, recipe: Recipe, before: Any, noted: Any, wanted: tuple[str, int, str]
) -> None:
    reports = []
    if before is not None:
        run.set_status(before, 2, "before")
    with open_run(recipe, rank(watch=lambda *_, report, **__: reports.append(report))) as held:
        if noted is not None:
            held.set_status(noted, 2, "no memory")
        reports[0]("rank 1 hangs")
    assert told(run) == wanted


def test_what_this_node_has_seen_is_told_beside_what_another_has_noted(
    run: RunDirectory, recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    run.set_status("failed", 1, "rank 1 (process 7 on b) has given no sign of life; stacks are in x")
    log = run.path / "log-node1.txt"
    log.write_text("step 3\nwatch: node 0 at a does not answer any more, for 9 s\nroot cause\n")
    seen = seen_from_here(log.read_text())
    with pytest.raises(
        TrainingError, match=r"no sign of life; stacks are in x\. Seen from this node: node 0 at a does not answer any more"
    ):
        workflow._ended(run, log, 1, None, 1.0, cause(log.read_text()), seen)
    run.set_status("running", None, "training")  # the other one could not note anything
    with pytest.raises(TrainingError, match=r"run: node 0 at a does not answer any more, for 9 s\. The last lines"):
        workflow._ended(run, log, 1, None, 1.0, cause(log.read_text()), seen)
    assert told(run) == ("failed", 1, "node 0 at a does not answer any more, for 9 s")


def test_another_node_waits_for_what_the_first_says(run: RunDirectory) -> None:
    """Of two that wait for a third in vain, both give up at once; the first knows how many came."""
    run.set_status("running", None, "starting")
    log = run.path / "log-node1.txt"
    log.write_text("wait timeout after 10000ms, keys: /torch.rendezvous/assigned_ranks\n")
    first = Timer(1.5, run.set_status, ("failed", 1, "only 2 of 3 nodes came within 11 s"))
    first.start()
    with pytest.raises(TrainingError, match=r"only 2 of 3 nodes came"):
        workflow._ended(run, log, 1, None, 1.0, cause(log.read_text()))
    first.join()
    assert told(run) == ("failed", 1, "only 2 of 3 nodes came within 11 s")


def fail_while_loading(run: RunDirectory) -> None:
    """Lose another rank when the checkpoint to go on from is found."""
    Saver(run, Checkpoint(), nothing).step = 5
    raise OSError("Connection closed by peer")


def fail_while_saving(run: RunDirectory, peer: bool) -> None:
    """Lose another rank; where `peer`, it has said why."""
    run.set_status("running", None, "training", step=4, steps=9, checkpoint=None)
    Saver(run, Checkpoint(), nothing).start(snapshot(5), 0.0)
    if peer:
        run.set_status("failed", 2, "x.jsonl:7: no JSON")
    raise OSError("Connection closed by peer")


def test_of_two_starts_at_once_the_refused_one_leaves_the_others_status_alone(
    run: RunDirectory, write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a node that does not write: its workers have met the other one's lease, which this node cannot judge by itself."""
    recipe = Recipe.load(write_recipe())
    words = f"{recipe.run_dir}: in use by process 7 on gpu1; wait for it"
    other = RunDirectory(recipe.run_dir)
    other.set_status("running", None, "training", step=3)

    def met_another(line: object, log: Path, *_: object) -> int:
        log.write_text(f"loading\nerror: {words}\nTraceback of torchrun\n")
        return 1

    monkeypatch.setattr(workflow.launcher, "run", met_another)
    monkeypatch.setattr(workflow, "prepare_for_training", lambda *_, **__: None)
    monkeypatch.setattr(workflow.base_cache, "ensure_ahead", lambda *_: None)
    with pytest.raises(RunError, match="in use by process 7 on gpu1"):
        workflow.start_training(recipe, [], Topology(processes=1, nodes=Nodes(2, 1, "gpu1", 1)))
    assert (other.status() or {})["state"] == "running"
