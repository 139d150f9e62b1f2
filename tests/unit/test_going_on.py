"""A run goes on only with the tokenizer, the data and the base model that it began with; both fingerprints are told."""

import errno
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mistral_dist import checkpoint
from mistral_dist.checkpoint import Progress
from mistral_dist.config import Checkpoint, Recipe, Train
from mistral_dist.data.feed import Feed
from mistral_dist.data.stream import Cursor, Work
from mistral_dist.errors import RunError, TrainingError
from mistral_dist.guards import Guard, Trouble
from mistral_dist.run import RunDirectory
from mistral_dist.session import Session
from mistral_dist.step import StepResult
from mistral_dist.validation import Validation
from tests.unit.test_checkpoint import snapshot
from tests.unit.test_saver import fails_with

RECIPE = "version: 1\ntask: {kind: chat}\ndata: {sources: [{path: x.jsonl}]}\nmodel: {name: org/model}\n"
STREAM: Any = SimpleNamespace(steps=9)
FEED = Feed(STREAM, "data-1", "data/r", "9 examples", "held-1", "encoding-1")
ALONE: Any = SimpleNamespace(
    is_main=True, world_size=1, sharding="ZeRO 0", memory_bytes=lambda: 1, on_main=lambda action: action(),
    gather=lambda value: [value], at=lambda *_: None,
    gather_adapter=lambda: snapshot(5).adapter, gather_moments=lambda: snapshot(5).moments,
)  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path / "run")


def session(run: RunDirectory, feed: Feed = FEED, base: str = "base-1") -> Session:
    path = run.path.parent / "r.yaml"
    path.write_text(RECIPE)
    return Session(Recipe.load(path), ALONE, run, feed, base=base)


@pytest.fixture
def saved(run: RunDirectory) -> Path:
    """A checkpoint with the facts that a run really saves."""
    return checkpoint.save(run.checkpoints, replace(snapshot(5), facts=session(run)._facts()), Checkpoint())


def test_a_run_that_another_took_over_is_neither_cut_back_nor_thinned_out(
    run: RunDirectory, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its lease was lost while this process loaded, or was paused."""
    late = session(run)
    late._find_checkpoint()
    run.append("metrics.jsonl", {"step": 9})
    monkeypatch.setattr(run, "check_publishing", fails_with(errno.ETIMEDOUT))
    for write in (late._mark_start, late._cut_back, lambda: late._retreat(5)):
        with pytest.raises(OSError):
            write()
    assert (run.path / "metrics.jsonl").read_text() == '{"step": 9}\n'
    assert saved.is_dir()
    monkeypatch.undo()
    late._cut_back()
    assert (run.path / "metrics.jsonl").read_text() == ""


def test_with_the_same_it_goes_on(run: RunDirectory, saved: Path) -> None:
    same = session(run)
    assert same._find_checkpoint() == saved
    assert (same.progress.step, same.saved, same.saver.step) == (5, 5, 5)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"encoding": "encoding-2"}, ["tokenizer or chat format", "fingerprint encoding-1 then, encoding-2 now"]),
        ({"fingerprint": "data-2"}, ["data of data/r", "fingerprint data-1 then, data-2 now"]),
        ({"held_out": "held-2"}, ["held-out data", "fingerprint held-1 then, held-2 now"]),
        # the data change with the tokenizer: the cause is named
        ({"encoding": "encoding-2", "fingerprint": "data-2"}, ["tokenizer or chat format", "encoding-1 then, encoding-2 now"]),
    ],
)
def test_other_data_or_tokenizer_are_refused_before_the_model_is_loaded(
    run: RunDirectory, saved: Path, changed: dict[str, str], words: list[str]
) -> None:
    with pytest.raises(RunError) as caught:
        session(run, replace(FEED, **changed))._find_checkpoint()
    for word in [str(run.path), *words, "run.dir=", "--fresh"]:
        assert word in str(caught.value)


def test_another_base_is_refused_before_it_is_loaded(run: RunDirectory, saved: Path) -> None:
    words = r"began with other files of the base org/model: fingerprint base-1 then, base-2 now; put them back .*run\.dir=.*--fresh"
    with pytest.raises(RunError, match=words):
        session(run, base="base-2")._find_checkpoint()


def test_where_no_checkpoint_is_whole_every_start_is_refused(run: RunDirectory, saved: Path) -> None:
    """Else the second one would take the run for a new one, and empty its metrics."""
    (saved / "manifest.json").unlink()
    for _ in range(2):
        with pytest.raises(RunError) as caught:
            session(run)._find_checkpoint()
        for word in [str(run.checkpoints), "checkpoint-5 is damaged (manifest.json is missing)", "--fresh"]:
            assert word in str(caught.value)


def saved_again(run: RunDirectory, **found: Any) -> Progress:
    """What the checkpoint of a resumed run holds where this was found out of its step since."""
    resumed = session(run)
    resumed.peft_config = snapshot(5).adapter_config
    resumed._find_checkpoint()
    written = (run.checkpoints / "checkpoint-5").stat().st_ino
    resumed.save(last=True)
    assert (run.checkpoints / "checkpoint-5").stat().st_ino == written, "it holds all that is known"
    resumed.progress = replace(resumed.progress, **found)
    resumed.save()
    assert resumed.saver.newest() == 5
    return checkpoint.load_progress(run.checkpoints / "checkpoint-5")[0]


def test_a_validation_that_a_stop_cut_short_reaches_the_checkpoint_of_its_step(run: RunDirectory, saved: Path) -> None:
    validation = Validation().after(5, 5, 0.25, Train())
    assert saved_again(run, validation=validation).validation == validation
    assert checkpoint.load_progress(saved)[1]["metric"] == 0.25


def test_a_way_back_reaches_the_checkpoint_that_it_led_to(run: RunDirectory, saved: Path) -> None:
    guard = Guard(windows=((6, 9),))
    assert saved_again(run, guard=guard).guard == guard


def test_a_checkpoint_that_could_not_be_written_anew_is_tried_again(
    run: RunDirectory, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resumed = session(run)
    resumed.peft_config = snapshot(5).adapter_config
    resumed._find_checkpoint()
    guard = Guard(windows=((6, 9),))
    resumed.progress = replace(resumed.progress, guard=guard)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "publish", fails_with(errno.ENOSPC))
        resumed.save()
        resumed.saver.newest()
    resumed.save(last=True)
    assert checkpoint.load_progress(saved)[0].guard == guard


def test_no_speed_is_noted_of_a_step_that_is_passed_over(run: RunDirectory) -> None:
    resumed = session(run)
    resumed.progress = replace(resumed.progress, guard=Guard(windows=((2, 3),)))
    works = [Work(step, (), 8, 8.0, 90, 2, 0.1, Cursor()) for step in (0, 1)]
    found = [resumed._metrics(work, StepResult(None, None, 0.1, "because"), 0.5) for work in works]
    assert [entry["tokens_per_second"] for entry in found] == [180.0, None]


@pytest.mark.parametrize(
    ("max_rewinds", "windows", "spent"),
    [
        (0, (), "train.max_rewinds=0 never goes back"),
        (1, ((2, 3),), "the run went back once already (train.max_rewinds)"),
        (2, ((2, 3), (4, 5)), "the run went back 2 times already (train.max_rewinds)"),
    ],
)
@pytest.mark.parametrize("refused", [0, 3])
def test_a_run_that_may_not_go_back_says_why_and_what_helps(
    run: RunDirectory, max_rewinds: int, windows: tuple[tuple[int, int], ...], spent: str, refused: int
) -> None:
    spoiled = session(run)
    train = spoiled.recipe.train.model_copy(update={"max_rewinds": max_rewinds})
    spoiled.recipe = spoiled.recipe.model_copy(update={"train": train})
    spoiled.progress = Progress(9, guard=Guard(refused=refused, windows=windows))
    with pytest.raises(TrainingError) as caught:
        spoiled.go_back(Trouble(6, 9, "because"))
    told = str(caught.value)
    assert f"step 9: because; {spent}; start another run" in told
    assert "optim.learning_rate" in told and "log.txt" not in told
    assert (str(run.path / "untrained.jsonl") in told) == (refused > 0), "else the examples are not to blame"


def test_that_another_rank_has_failed_stays_in_the_status(run: RunDirectory) -> None:
    """The first rank makes a step more before it notices: the cause and its exit code are not lost."""
    one = session(run)
    run.set_status("failed", 2, "the mark of an older launch")
    one._mark_start()
    one._tell_status()
    assert (run.status() or {})["state"] == "running"
    run.set_status("failed", 2, "x.jsonl:7: no JSON")
    one._tell_status()
    status = run.status() or {}
    assert (status["state"], status["exit_code"], status["message"]) == ("failed", 2, "x.jsonl:7: no JSON")


def test_no_tracker_is_told_the_secrets_of_a_url(run: RunDirectory) -> None:
    path = run.path.parent / "r.yaml"
    path.write_text(RECIPE.replace("x.jsonl", '"https://me:PASSWORD@there.org/x.jsonl?X-Amz-Signature=SIGNATURE"'))
    told = str(Session(Recipe.load(path), ALONE, run, FEED).trackers._recipe)
    assert "there.org/x.jsonl" in told
    assert "PASSWORD" not in told and "SIGNATURE" not in told
