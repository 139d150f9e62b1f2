"""What training is fed with: which sources are streamed, and when a stream counts as another one."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mistral_dist.config import Recipe
from mistral_dist.data.feed import has_held_out, open_feed, refuse_unvalidated
from mistral_dist.data.lanes import Lanes
from mistral_dist.data.prepared import Prepared
from mistral_dist.errors import DataError, RecipeError
from mistral_dist.evaluate import evaluate
from mistral_dist.workflow import prepare_if_needed

ENCODER: Any = SimpleNamespace(fingerprint="abc")


def recipe(folder: Path, *overrides: str, sources: "list[dict[str, object]] | None" = None) -> Recipe:
    for name in ("a", "b"):
        file = folder / f"{name}.jsonl"
        if not file.exists():
            file.write_text('{"text": "one"}\n{"text": "two"}\n')
    given = sources or [{"path": str(folder / "a.jsonl")}, {"path": str(folder / "b.jsonl"), "into": "train", "weight": 3}]
    content = {
        "version": 1,
        "task": {"kind": "pretrain"},
        "data": {"sources": given, "streaming": True},
        "model": {"name": "test/none", "path": str(folder / "no-model")},
        "train": {"steps": 3, "global_batch_size": 2},
    }
    (folder / "recipe.yaml").write_text(json.dumps(content))
    return Recipe.load(folder / "recipe.yaml", overrides)


def test_the_sources_to_train_on_are_streamed_and_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources: list[dict[str, object]] = [
        {"path": str(tmp_path / f"{name}.jsonl"), "into": into} for name, into in (("a", "test"), ("b", None))
    ]
    loaded = recipe(tmp_path, sources=sources)
    assert has_held_out(loaded.data)
    with pytest.raises(DataError, match="no prepared data there"):
        open_feed(loaded, ENCODER, 0, 1)
    held_out = Prepared(tmp_path, {"fingerprint": "held out", "examples": {"test": 2}})
    monkeypatch.setattr("mistral_dist.data.feed.open_prepared", lambda *_: held_out)
    feed = open_feed(loaded, ENCODER, 0, 1)
    stream = feed.stream
    assert isinstance(stream, Lanes)
    assert [(source.index, [shard.name for shard in source.shards]) for source in stream.sources] == [(1, [str(tmp_path / "b.jsonl")])]
    assert feed.held_out == "held out" != feed.fingerprint
    both = open_feed(recipe(tmp_path), ENCODER, 0, 1)
    assert isinstance(both.stream, Lanes)
    assert [(source.index, source.weight) for source in both.stream.sources] == [(0, 1.0), (1, 3.0)]
    assert both.stream.steps == 3
    assert both.held_out == ""
    assert not has_held_out(recipe(tmp_path).data)


def test_a_stream_of_nothing_is_refused(tmp_path: Path) -> None:
    loaded = recipe(tmp_path, sources=[{"path": str(tmp_path / "a.jsonl"), "into": "validation"}])
    with pytest.raises(DataError, match="none to train on"):
        open_feed(loaded, ENCODER, 0, 1)


def test_a_stream_needs_its_steps(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"train\.steps"):
        recipe(tmp_path, "train.steps=null")


def test_a_stream_is_another_one_when_its_files_its_section_or_its_encoding_change(tmp_path: Path) -> None:
    first = open_feed(recipe(tmp_path), ENCODER, 0, 1).fingerprint
    assert open_feed(recipe(tmp_path, "data.dir=elsewhere", "data.workers=3"), ENCODER, 1, 2).fingerprint == first
    assert open_feed(recipe(tmp_path, "data.block=7"), ENCODER, 0, 1).fingerprint != first
    assert open_feed(recipe(tmp_path), SimpleNamespace(fingerprint="abd"), 0, 1).fingerprint != first  # type: ignore[arg-type]
    with open(tmp_path / "b.jsonl", "a") as file:
        file.write('{"text": "three"}\n')
    assert open_feed(recipe(tmp_path), ENCODER, 0, 1).fingerprint != first


def test_where_nothing_is_held_out_nothing_is_prepared_and_nothing_evaluated(tmp_path: Path) -> None:
    loaded = recipe(tmp_path, f"data.dir={tmp_path / 'data'}")
    # there is no model to load: neither comes that far
    assert prepare_if_needed(loaded) is None
    assert not (tmp_path / "data").exists()
    nothing: Any = None
    with pytest.raises(DataError, match="nothing was held out"):
        evaluate(loaded, nothing, nothing)


def test_a_run_that_is_to_be_validated_needs_examples_for_it(tmp_path: Path) -> None:
    sources: list[dict[str, object]] = [{"path": str(tmp_path / "a.jsonl")}, {"path": str(tmp_path / "b.jsonl"), "into": "validation"}]
    none, some = (Prepared(tmp_path / "data", {"examples": {"validation": count}}) for count in (0, 1))
    validated = recipe(tmp_path, "train.eval_steps=2", sources=sources)
    with pytest.raises(DataError, match=r"train\.eval_steps=2: .*data holds no validation examples; .*train\.eval_steps=null"):
        refuse_unvalidated(validated, none)
    refuse_unvalidated(validated, some)
    refuse_unvalidated(recipe(tmp_path, sources=sources), none)
