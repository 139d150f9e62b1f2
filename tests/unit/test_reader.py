"""Rows of a stream become what `prepare` would have made of them, and what is dropped is said."""

import json
from pathlib import Path

import pytest

from mistral_dist.config import Recipe
from mistral_dist.data.cleaner import Cleaner, read_benchmarks
from mistral_dist.data.duplicates import Benchmark
from mistral_dist.data.encode import Encoder, load_encoder
from mistral_dist.data.example import Example, Row
from mistral_dist.data.reader import BlockReader


def recipe(folder: Path, model: Path, task: dict[str, object], **data: object) -> Recipe:
    content = {
        "version": 1,
        "task": task,
        "data": {"sources": [{"path": "a.jsonl"}, {"path": "b.jsonl", "columns": {"text": "body"}}], "streaming": True, **data},
        "model": {"name": "test/small", "path": str(model)},
        "train": {"steps": 3},
    }
    (folder / "recipe.yaml").write_text(json.dumps(content))
    return Recipe.load(folder / "recipe.yaml")


def reader(loaded: Recipe, encoder: Encoder, label_weights: "dict[str, float] | None" = None) -> BlockReader:
    return BlockReader(Cleaner(loaded, encoder, Benchmark(read_benchmarks(loaded))), label_weights)


def row(source: int, n: int, values: "dict[str, str] | str") -> tuple[int, Row]:
    return source, Row(f"{'ab'[source]}.jsonl:{n}", (json.dumps(values) if isinstance(values, dict) else values).encode())


def test_rows_are_read_by_their_source_and_drops_are_told(small_model: Path, tmp_path: Path) -> None:
    loaded = recipe(tmp_path, small_model, {"kind": "classification", "labels": ["x", "y"]}, max_length=64)
    encoder = load_encoder(loaded)
    read = reader(loaded, encoder).block(
        [
            row(0, 1, {"text": "one ", "label": "x"}),
            row(0, 2, "{nonsense"),
            row(1, 1, {"body": "two", "label": "y"}),
            row(1, 2, {"body": "long " * 100, "label": "y"}),
            row(1, 3, {"body": "three", "label": "z"}),
            row(0, 3, {"text": "", "label": "x"}),
            row(0, 4, {"text": "four", "label": "x"}),
        ]
    )
    wanted = [Example("", text=text, label=label) for text, label in (("one", "x"), ("two", "y"), ("four", "x"))]
    assert [name for name, _ in read.examples] == [example.id for example in wanted]
    for (_, found), example in zip(read.examples, wanted, strict=True):
        assert list(found.ids) == list(encoder.encode(example).ids)
        assert list(found.targets) == list(encoder.encode(example).targets)
    assert [(n, drop.place, drop.reason, drop.is_bad) for n, drop in read.drops if n != 5] == [
        (1, "a.jsonl:2", "not_json", True),
        (3, "b.jsonl:2", "too_long", False),
        (4, "b.jsonl:3", "unknown_label", True),
    ]
    assert [n for n, _ in read.drops if n == 5] == [5]
    weighted = reader(loaded, encoder, {"y": 2.5}).block(
        [row(0, 1, {"text": "one", "label": "x"}), row(1, 1, {"body": "two", "label": "y"})]
    )
    assert [found.weight for _, found in weighted.examples] == [1.0, 2.5]


def test_a_long_text_is_cut_into_pieces_that_are_the_text(small_model: Path, tmp_path: Path) -> None:
    loaded = recipe(tmp_path, small_model, {"kind": "pretrain"}, max_length=32)
    text = " ".join(f"word{n}" for n in range(60))
    encoder = load_encoder(loaded)
    read = reader(loaded, encoder).block([row(0, 1, {"text": "short"}), row(0, 2, {"text": text})])
    names = [name for name, _ in read.examples]
    assert len(names) > 3 and names[1:] == [f"{Example('', text=text).id}-{n}" for n in range(1, len(names))]
    assert all(len(one.ids) <= 32 for _, one in read.examples)
    pieces = [encoder.tokenizer.decode(one.ids, skip_special_tokens=True) for _, one in read.examples[1:]]
    assert "".join(pieces) == text
    assert read.drops == []


@pytest.mark.parametrize("rows", [[], [row(0, 1, "{")]])
def test_a_block_may_hold_nothing(rows: list[tuple[int, Row]], small_model: Path, tmp_path: Path) -> None:
    loaded = recipe(tmp_path, small_model, {"kind": "pretrain"})
    read = reader(loaded, load_encoder(loaded)).block(rows)
    assert read.examples == [] and len(read.drops) == len(rows)
