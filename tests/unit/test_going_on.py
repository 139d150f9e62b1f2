"""A run goes on only with the tokenizer, the data and the base model that it began with; both fingerprints are told."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mistral_dist import checkpoint
from mistral_dist.config import Checkpoint, Recipe
from mistral_dist.data.feed import Feed
from mistral_dist.errors import RunError
from mistral_dist.run import RunDirectory
from mistral_dist.session import Session
from tests.unit.test_checkpoint import snapshot

RECIPE = "version: 1\ntask: {kind: chat}\ndata: {sources: [{path: x.jsonl}]}\nmodel: {name: org/model}\n"
STREAM: Any = SimpleNamespace(steps=9)
FEED = Feed(STREAM, "data-1", "data/r", "9 examples", "held-1", "encoding-1")
ALONE: Any = SimpleNamespace(is_main=True, world_size=1, sharding="ZeRO 0", on_main=lambda action: action())


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
