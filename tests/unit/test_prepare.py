"""Preparing on the real tokenizer: counts that add up, splits that stay, and nothing lost without a word."""

import json
import os
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import transformers
from sklearn.utils.class_weight import compute_class_weight

from mistral_dist.card import model_card
from mistral_dist.config import Data, Model, Recipe, Source, Task
from mistral_dist.data.audit import written
from mistral_dist.data.encode import Encoder
from mistral_dist.data.example import Example, Rejected, from_record
from mistral_dist.data.feed import open_feed
from mistral_dist.data.fit import fit
from mistral_dist.data.prepare import prepare
from mistral_dist.data.prepared import Prepared, open_prepared, read_manifest, sources_changed
from mistral_dist.data.split import SPLITS
from mistral_dist.data.stream import Plan, Stream
from mistral_dist.errors import WRONG_INPUT, DataError
from mistral_dist.files import aside_of
from mistral_dist.hub import load_tokenizer
from mistral_dist.workflow import prepare_if_needed

WriteRecipe = Callable[..., Path]
CHAT = {"kind": "chat", "labels": [], "prompt": "{text}", "system": None}
PRETRAIN = {"kind": "pretrain", "labels": [], "system": None}


@pytest.fixture(scope="module")
def tokenizer(small_model: Path) -> Any:
    return load_tokenizer(Model(name="test/small", path=str(small_model)))


@pytest.fixture
def prepared(tokenizer: Any) -> Callable[..., tuple[Recipe, Prepared]]:
    def make(path: Path, *overrides: str) -> tuple[Recipe, Prepared]:
        recipe = Recipe.load(path, overrides)
        return recipe, prepare(recipe, Encoder(tokenizer, recipe.task))

    return make


Make = Callable[..., tuple[Recipe, Prepared]]


def records(found: Prepared, *names: str) -> list[dict[str, Any]]:
    return [record for name in names or SPLITS for record in found.split(name)]


def beside(folder: Path) -> list[str]:
    """What stands beside a data directory, but for its lock."""
    return [path.name for path in folder.parent.iterdir() if path != folder and path.name != f".{folder.name}.lock"]


def refusal(action: Callable[[], object]) -> str:
    with pytest.raises(DataError) as caught:
        action()
    assert caught.value.exit_code == WRONG_INPUT
    assert "\n" not in str(caught.value)
    return str(caught.value)


def quarantine(found: Prepared) -> list[dict[str, str]]:
    return [json.loads(line) for line in (found.path / "quarantine.jsonl").read_text(encoding="utf-8").splitlines()]


def cut_up(text: str, capacity: int, encoder: Encoder) -> list[str]:
    """The pieces of one text."""
    data = Data(sources=(Source(path="x"),), max_length=capacity)
    (pieces,) = fit([Example("f:1", text)], encoder, data)
    assert not isinstance(pieces, Rejected)
    return [piece.example.text for piece in pieces]


# what is written


def test_counts_add_up_and_every_dropped_row_is_kept_with_its_reason(
    write_recipe: WriteRecipe, prepared: Make, texts: list[dict[str, str]]
) -> None:
    bad = [
        texts[0],
        {"text": "", "label": "numpy"},
        {"text": "on both sides", "label": "numpy"},
        {"text": "on both sides", "label": "torch"},
        {"text": "Länge " * 300, "label": "torch"},
    ]
    _, found = prepared(write_recipe(rows=texts + bad))
    manifest = found.manifest
    assert manifest["rows"] == 305
    assert manifest["dropped"] == {"conflicting_labels": 2, "duplicate": 1, "too_long": 1, "too_short": 1}
    assert manifest["rows"] == sum(manifest["documents"].values()) + sum(manifest["dropped"].values())
    assert manifest["examples"] == {"train": 240, "validation": 30, "test": 30}
    lines = {int(entry["place"].rpartition(":")[2]): entry for entry in quarantine(found)}
    assert {line: entry["reason"] for line, entry in lines.items()} == {
        301: "duplicate",
        302: "too_short",
        303: "conflicting_labels",
        304: "conflicting_labels",
        305: "too_long",
    }
    assert lines[301]["because"].endswith("small.jsonl:1")
    assert "data.max_length is 192" in lines[305]["because"]
    assert lines[305]["text"].startswith("Länge Länge")


def test_the_manifest_says_what_the_shards_hold(write_recipe: WriteRecipe, prepared: Make) -> None:
    recipe, found = prepared(write_recipe())
    assert read_manifest(recipe.data_dir) == found.manifest
    for name in SPLITS:
        split = records(found, name)
        assert found.manifest["examples"][name] == len(split) > 0
        assert found.manifest["tokens"][name] == sum(record["tokens"] for record in split)
        assert found.manifest["targets"][name] == sum(record["targets"] for record in split)
        assert sum(found.manifest["labels"][name].values()) == len(split)
        tokens, targets = found.lengths(name)
        assert tokens.tolist() == [record["tokens"] for record in split]
        assert targets.tolist() == [record["targets"] for record in split]
    assert sorted(path.name for path in recipe.data_dir.iterdir()) == [
        "assignments.arrow",
        "audit.md",
        "manifest.json",
        "quarantine.jsonl",
        *sorted(SPLITS),
    ]
    assert beside(recipe.data_dir) == [], "nothing is left aside"


def test_no_row_is_in_two_splits_and_all_are_in_one(write_recipe: WriteRecipe, prepared: Make, texts: list[dict[str, str]]) -> None:
    _, found = prepared(write_recipe())
    assert sorted(record["text"] for record in records(found)) == sorted(row["text"] for row in texts)


def test_the_stored_lengths_are_those_of_the_encoding(write_recipe: WriteRecipe, prepared: Make, tokenizer: Any) -> None:
    recipe, found = prepared(write_recipe())
    encoder = Encoder(tokenizer, recipe.task)
    for record in records(found)[::7]:
        encoded = encoder.encode(from_record(record))
        assert (len(encoded.ids), len(encoded.targets)) == (record["tokens"], record["targets"])


def test_to_prepare_twice_gives_the_same(write_recipe: WriteRecipe, prepared: Make) -> None:
    path = write_recipe()
    first = prepared(path)[1]
    before = records(first)
    second = prepared(path)[1]
    assert first.manifest == second.manifest
    assert before == records(second)


def test_conversations_come_back_as_they_were(write_recipe: WriteRecipe, prepared: Make) -> None:
    rows = [{"messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": f"a {n}"}]} for n in range(20)]
    _, found = prepared(write_recipe(rows=rows, task=CHAT))
    asked = {from_record(record).messages[0]["content"]: from_record(record).messages for record in records(found)}
    assert asked == {row["messages"][0]["content"]: tuple(row["messages"]) for row in rows}


# what is refused


@pytest.mark.parametrize(
    ("rows", "overrides", "words"),
    [
        (1, [], ["the validation split is empty", "1 rows read, 1 kept", "data.validation_fraction=0"]),
        (2, ["data.validation_fraction=0"], ["the test split is empty", "2 rows read", "data.test_fraction=0"]),
    ],
)
def test_an_empty_split_is_refused_with_its_name_and_the_remedy(
    write_recipe: WriteRecipe, prepared: Make, texts: list[dict[str, str]], rows: int, overrides: list[str], words: list[str]
) -> None:
    path = write_recipe(rows=texts[:rows])
    line = refusal(lambda: prepared(path, *overrides))
    for word in [*words, "add data"]:
        assert word in line
    assert read_manifest(Recipe.load(path).data_dir) is None


def test_a_train_split_of_nothing_says_what_became_of_the_rows(write_recipe: WriteRecipe, prepared: Make) -> None:
    path = write_recipe(rows=[{"text": "", "label": "numpy"}, {"text": " ", "label": "torch"}])
    line = refusal(lambda: prepared(path))
    for word in ["the train split is empty", "2 rows read, 0 kept", "left out: 2 too_short"]:
        assert word in line


def test_shares_of_nothing_need_no_rows(write_recipe: WriteRecipe, prepared: Make, texts: list[dict[str, str]]) -> None:
    _, found = prepared(write_recipe(rows=texts[:3]), "data.validation_fraction=0", "data.test_fraction=0")
    assert found.manifest["examples"] == {"train": 3, "validation": 0, "test": 0}
    assert found.lengths("test")[0].shape == (0,)


def test_an_overlong_example_can_be_an_error(write_recipe: WriteRecipe, prepared: Make, texts: list[dict[str, str]]) -> None:
    path = write_recipe(rows=[*texts[:40], {"text": "long " * 400, "label": "torch"}])
    line = refusal(lambda: prepared(path, "data.overlong=error"))
    for word in ["small.jsonl:41", "data.max_length is 192", "data.overlong=drop"]:
        assert word in line


def test_a_conversation_without_an_answer_is_refused_with_file_and_line(write_recipe: WriteRecipe, prepared: Make) -> None:
    rows: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": f"a{n}"}]} for n in range(9)
    ]
    rows[6] = {"messages": [{"role": "user", "content": "q"}]}
    path = write_recipe(rows=rows, task=CHAT)
    line = refusal(lambda: prepared(path))
    for word in [f"{path.parent / 'small.jsonl'}:7", "no answer to learn from", "add one or remove the row"]:
        assert word in line


def test_a_missing_source_is_refused_before_what_was_prepared_is_touched(write_recipe: WriteRecipe, prepared: Make) -> None:
    path = write_recipe()
    recipe, _ = prepared(path)
    (path.parent / "small.jsonl").unlink()
    assert "no such file" in refusal(lambda: prepared(path))
    assert read_manifest(recipe.data_dir) is not None


# plain text


def long_texts() -> list[dict[str, str]]:
    words = ["The", "knee", "—", "a", "hinge", "bears", "weight;", "naïve", "数学", "and", "😀", "faces:", "über", "alles?\n\nNext"]
    return [
        {"text": f"Document {n}. " + " ".join(words[(n + k * (k % 5 + 1)) % len(words)] for k in range(200 * (n % 4)))} for n in range(20)
    ]


@pytest.mark.parametrize("max_length", [16, 64, 192])
def test_long_texts_are_cut_into_pieces_that_fit_and_lose_nothing(
    write_recipe: WriteRecipe, prepared: Make, tokenizer: Any, max_length: int
) -> None:
    recipe, found = prepared(write_recipe(rows=long_texts(), task=PRETRAIN), f"data.max_length={max_length}")
    encoder = Encoder(tokenizer, recipe.task)
    pieces: dict[str, dict[int, str]] = {}
    for record in records(found):
        assert record["tokens"] == len(encoder.encode(from_record(record)).ids) <= max_length
        place, _, part = record["place"].partition(" part ")
        pieces.setdefault(place, {})[int(part or 1)] = record["text"]
    assert found.manifest["dropped"] == {}
    joined = {place: "".join(text for _, text in sorted(parts.items())) for place, parts in pieces.items()}
    assert sorted(joined.values()) == sorted(row["text"].strip() for row in long_texts())
    assert max(map(len, pieces.values())) > 1


def test_the_pieces_of_a_text_stay_in_one_split(write_recipe: WriteRecipe, prepared: Make) -> None:
    _, found = prepared(write_recipe(rows=long_texts(), task=PRETRAIN), "data.max_length=32")
    documents = {name: {record["document"] for record in records(found, name)} for name in SPLITS}
    assert sum(map(len, documents.values())) == len(set.union(*documents.values())) == 20


def test_counts_of_cut_texts_add_up_in_documents(write_recipe: WriteRecipe, prepared: Make) -> None:
    _, found = prepared(write_recipe(rows=long_texts(), task=PRETRAIN), "data.max_length=32")
    assert found.manifest["rows"] == 20 == sum(found.manifest["documents"].values())
    assert sum(found.manifest["examples"].values()) > 20


def test_pieces_that_say_the_same_have_different_ids(write_recipe: WriteRecipe, prepared: Make) -> None:
    """Exactly once is checked by id: two pieces with one id could not be told apart."""
    rows = [{"text": f"{n} " + "over and over " * 100} for n in range(12)]
    _, found = prepared(write_recipe(rows=rows, task=PRETRAIN), "data.max_length=34")
    ids = [record["id"] for record in records(found)]
    assert len(ids) == len(set(ids))


def test_a_capacity_below_one_character_is_refused(write_recipe: WriteRecipe, prepared: Make) -> None:
    with pytest.raises(DataError, match=r"the train split is empty.*/small.jsonl:\d+: data.max_length=3 does not hold a single character"):
        prepared(write_recipe(rows=[{"text": f"{n} 😀👩"} for n in range(20)], task=PRETRAIN), "data.max_length=3")


@pytest.mark.parametrize("max_length", [5, 6, 8])
def test_a_very_small_capacity_loses_nothing_without_a_word(write_recipe: WriteRecipe, prepared: Make, max_length: int) -> None:
    """A piece that does not fit after all is counted, not an assertion that fails."""
    _, found = prepared(write_recipe(rows=long_texts(), task=PRETRAIN), f"data.max_length={max_length}")
    assert all(record["tokens"] <= max_length for record in records(found))
    assert found.manifest["dropped"].get("too_long", 0) == sum(entry["reason"] == "too_long" for entry in quarantine(found))


def test_a_piece_may_have_more_tokens_alone_than_in_its_text(tokenizer: Any) -> None:
    """Cutting between tokens: what is tokenized alone fits, whatever the text is made of."""
    encoder = Encoder(tokenizer, Task(kind="pretrain"))
    for text in ["😀👩‍👩‍👧‍👦" * 200, "数学" * 300, " " * 50 + "x" * 700, "\n\n \t" * 100 + "end", "ﷺ" * 200, "a\u0301\u0323" * 200]:
        for capacity in (16, 33, 64):
            pieces = cut_up(text, capacity, encoder)
            assert "".join(pieces) == text
            assert max(len(encoder.encode(Example("f:1", piece)).ids) for piece in pieces) <= capacity


def test_a_character_of_several_tokens_is_not_too_much_for_its_piece() -> None:
    """As in Mistral's own vocabularies: what they do not know is spelled in bytes, four tokens for one emoji."""
    vocabulary = {token: n for n, token in enumerate(["<s>", "</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))])}
    model = tokenizers.models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True)
    spelled = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(model), bos_token="<s>", eos_token="</s>")
    assert len(spelled.encode("😀", add_special_tokens=False)) == 4
    encoder = Encoder(spelled, Task(kind="pretrain"))
    text = "😀" * 200
    for capacity in (16, 33, 64):
        pieces = cut_up(text, capacity, encoder)
        assert "".join(pieces) == text
        assert max(len(encoder.encode(Example("f:1", piece)).ids) for piece in pieces) <= capacity


# preparing again


def test_more_rows_move_no_old_example(write_recipe: WriteRecipe, prepared: Make, texts: list[dict[str, str]]) -> None:
    recipe, first = prepared(write_recipe(rows=texts[:100]))
    before = {record["id"]: name for name in SPLITS for record in records(first, name)}
    _, second = prepared(write_recipe(rows=texts[::-1]))
    after = {record["id"]: name for name in SPLITS for record in records(second, name)}
    assert len(before) == 100
    assert len(after) == 300
    assert {id: after[id] for id in before} == before
    assert second.manifest["examples"] == {"train": 240, "validation": 30, "test": 30}
    assert beside(recipe.data_dir) == [], "nothing is left aside"


def test_another_share_splits_anew(write_recipe: WriteRecipe, prepared: Make) -> None:
    path = write_recipe()
    prepared(path)
    assert prepared(path, "data.test_fraction=0.5")[1].manifest["examples"]["test"] == 150


@pytest.mark.parametrize("content", ["my thesis.txt", "train/mine.txt"])
def test_a_folder_that_prepare_did_not_make_is_never_removed(write_recipe: WriteRecipe, prepared: Make, content: str) -> None:
    path = write_recipe()
    mine = Recipe.load(path).data_dir / content
    mine.parent.mkdir(parents=True)
    mine.write_text("years of work")
    line = refusal(lambda: prepared(path))
    for word in [str(Recipe.load(path).data_dir), "holds something else", "data.dir"]:
        assert word in line
    assert mine.read_text() == "years of work"
    assert beside(Recipe.load(path).data_dir) == []


def test_a_file_in_the_place_of_the_folder_is_refused(write_recipe: WriteRecipe, prepared: Make) -> None:
    path = write_recipe()
    target = Recipe.load(path).data_dir
    target.parent.mkdir(parents=True)
    target.write_text("a file")
    assert str(target) in refusal(lambda: prepared(path))
    assert target.read_text() == "a file"


def test_a_directory_whose_name_begins_alike_is_left_alone(write_recipe: WriteRecipe, prepared: Make) -> None:
    """`small` and `small-large` are prepared at the same time: neither takes what the other has not finished."""
    path = write_recipe()
    folder = Recipe.load(path).data_dir
    other = aside_of(folder.with_name(f"{folder.name}-large"))
    own = aside_of(folder)
    for aside in (other, own):
        aside.mkdir(parents=True)
        (aside / "manifest.json").write_text("{}")
    prepared(path)
    assert other.is_dir()
    assert not own.exists()


def test_a_group_that_is_named_later_assigns_all_anew(write_recipe: WriteRecipe, prepared: Make, texts: list[dict[str, str]]) -> None:
    rows = [{**row, "author": n % 30} for n, row in enumerate(texts)]
    path = write_recipe(rows=rows)
    assert sum(prepared(path)[1].manifest["documents"].values()) == 300
    source = {"path": str(path.parent / "small.jsonl"), "group": "author"}
    _, found = prepared(write_recipe(rows=rows, data={"sources": [source]}))
    assert sum(found.manifest["documents"].values()) == 300
    assert found.manifest["leakage"] == {"equal": 0, "groups": 0}


def test_a_group_that_no_row_has_is_refused(write_recipe: WriteRecipe, prepared: Make, texts: list[dict[str, str]]) -> None:
    rows = [{**row, "author": n % 30} for n, row in enumerate(texts[:100])]
    path = write_recipe(rows=rows)
    source = {"path": str(path.parent / "small.jsonl"), "group": "autor"}
    line = refusal(lambda: prepared(write_recipe(rows=rows, data={"sources": [source]})))
    assert "data.sources.0.group: no row has a value in the column 'autor'" in line
    _, found = prepared(write_recipe(rows=rows, data={"sources": [{**source, "group": "author"}]}))
    assert found.manifest["groups"] == {"0": {"documents": 100, "groups": 30}}
    assert "column `author`: 100 documents in 30 groups" in (found.path / "audit.md").read_text()


def test_a_directory_that_cannot_be_written_says_so(write_recipe: WriteRecipe, prepared: Make) -> None:
    path = write_recipe()
    assert "cannot be written" in refusal(lambda: prepared(path, "data.dir=/proc/nothing"))


def test_a_group_is_one_across_sources(write_recipe: WriteRecipe, prepared: Make, tmp_path: Path, texts: list[dict[str, str]]) -> None:
    """Train and test of the user's own share their patients: what is in train goes."""
    for name, rows in {"train": texts[:100], "test": texts[100:140]}.items():
        lines = [json.dumps({**row, "patient": n % 20}) + "\n" for n, row in enumerate(rows)]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    sources = [{"path": str(tmp_path / f"{name}.jsonl"), "into": name, "group": "patient"} for name in ("train", "test")]
    found = refusal(lambda: prepared(write_recipe(data={"sources": sources})))
    assert "the train split is empty: 140 rows read, 40 kept, left out: 100 leaks" in found
    assert f"is in train, and belongs together with {tmp_path}/test.jsonl:1 in test" in found


def test_more_sources_in_front_move_no_old_row(
    write_recipe: WriteRecipe, prepared: Make, tmp_path: Path, texts: list[dict[str, str]]
) -> None:
    rows = [{**row, "author": n % 30} for n, row in enumerate(texts[:200])]
    own = {"path": str(tmp_path / "small.jsonl"), "group": "author"}
    _, found = prepared(write_recipe(rows=rows, data={"sources": [own], "near_duplicates": 0.8}))
    before = {record["id"]: name for name in SPLITS for record in records(found, name)}
    (tmp_path / "front.jsonl").write_text("".join(json.dumps({**row, "text": row["text"] + " And more."}) + "\n" for row in rows))
    front = {"path": str(tmp_path / "front.jsonl"), "group": "author"}
    _, found = prepared(write_recipe(rows=rows, data={"sources": [front, own], "near_duplicates": 0.8}))
    after = {record["id"]: name for name in SPLITS for record in records(found, name)}
    assert {id: after.get(id) for id in before} == before


def test_another_length_moves_no_example(write_recipe: WriteRecipe, prepared: Make, texts: list[dict[str, str]]) -> None:
    rows = [{**row, "text": row["text"] + " word" * (90 + n)} for n, row in enumerate(texts[:60])]
    sides = []
    for length in ("192", "180"):
        _, found = prepared(write_recipe(rows=rows, data={"overlong": "shorten"}), f"data.max_length={length}")
        assert found.manifest["changed"]["shortened"] > 20
        sides.append({record["place"]: (name, record["id"]) for name in SPLITS for record in records(found, name)})
    assert sides[0] == sides[1]


def test_what_is_secret_in_an_address_is_in_no_audit_and_no_model_card(write_recipe: WriteRecipe, prepared: Make) -> None:
    _, found = prepared(write_recipe("known"))
    signed = ["https://h/x.jsonl?Signature=SECRET", "sftp://user:SECRET@h/x.jsonl"]
    recipe = Recipe.load(write_recipe(data={"sources": [{"path": path} for path in signed]}))
    told = written(found.manifest, {}, recipe) + model_card(recipe, "data", 3)
    assert "SECRET" not in told
    assert told.count("https://h/x.jsonl") == told.count("sftp://h/x.jsonl") == 2


def test_an_empty_folder_is_taken(write_recipe: WriteRecipe, prepared: Make) -> None:
    path = write_recipe()
    Recipe.load(path).data_dir.mkdir(parents=True)
    assert prepared(path)[1].manifest["rows"] == 300


def test_a_write_that_is_cut_short_leaves_what_was_there(
    write_recipe: WriteRecipe, prepared: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_recipe()
    recipe, first = prepared(path)

    def killed(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("mistral_dist.data.assignments.write", killed)
    with pytest.raises(OSError, match="No space"):
        prepared(path)
    assert read_manifest(recipe.data_dir) == first.manifest
    assert beside(recipe.data_dir) == []


# opening


def test_what_was_prepared_is_opened(write_recipe: WriteRecipe, prepared: Make, tokenizer: Any) -> None:
    recipe, found = prepared(write_recipe())
    opened = open_prepared(recipe, Encoder(tokenizer, recipe.task))
    assert opened == found
    assert opened.fingerprint == found.fingerprint


def test_data_that_were_not_prepared_name_the_command(write_recipe: WriteRecipe, tokenizer: Any) -> None:
    recipe = Recipe.load(write_recipe())
    line = refusal(lambda: open_prepared(recipe, Encoder(tokenizer, recipe.task)))
    for word in [str(recipe.data_dir), "no prepared data", "mistral-dist prepare"]:
        assert word in line


@pytest.mark.parametrize(
    "override",
    [
        "data.max_length=128",
        "data.seed=1",
        "data.min_characters=5",
        "data.near_duplicates=0.9",
        "data.test_fraction=0.2",
        "task.system=Be brief.",
    ],
)
def test_a_changed_section_is_noticed(write_recipe: WriteRecipe, prepared: Make, tokenizer: Any, override: str) -> None:
    path = write_recipe()
    prepared(path)
    changed = Recipe.load(path, [override])
    line = refusal(lambda: open_prepared(changed, Encoder(tokenizer, changed.task)))
    for word in ["another data or task section", "mistral-dist prepare"]:
        assert word in line


def test_what_does_not_touch_the_data_needs_no_new_ones(write_recipe: WriteRecipe, prepared: Make, tokenizer: Any) -> None:
    path = write_recipe()
    prepared(path)
    changed = Recipe.load(path, ["optim.learning_rate=1e-5", "train.seed=9", "lora.r=2", "task.class_weights=balanced"])
    open_prepared(changed, Encoder(tokenizer, changed.task))


def test_what_is_prepared_can_be_used_when_its_files_are_gone(
    write_recipe: WriteRecipe, prepared: Make, tmp_path: Path, texts: list[dict[str, str]]
) -> None:
    path = write_recipe()
    recipe, found = prepared(path)
    (tmp_path / "small.jsonl").unlink()
    assert prepare_if_needed(recipe).manifest == found.manifest
    with pytest.raises(DataError, match="no such file"):
        prepare_if_needed(recipe, again=True)


def test_a_changed_source_is_noticed(write_recipe: WriteRecipe, prepared: Make, texts: list[dict[str, str]]) -> None:
    path = write_recipe(rows=texts[:100])
    recipe, found = prepared(path)
    assert not sources_changed(recipe, found)
    write_recipe(rows=texts)
    assert sources_changed(recipe, found)


def test_remote_sources_are_not_asked_for_what_is_prepared(write_recipe: WriteRecipe, prepared: Make) -> None:
    _, found = prepared(write_recipe())
    gone = Recipe.load(write_recipe(data={"sources": [{"path": "http://127.0.0.1:9/gone.jsonl"}]}))
    manifest = {**found.manifest, "sources": {"http://127.0.0.1:9/gone.jsonl": [10, "etag"]}}
    assert not sources_changed(gone, Prepared(found.path, manifest))


def test_the_fingerprint_is_of_the_examples_and_not_of_where_they_lie(
    write_recipe: WriteRecipe, prepared: Make, texts: list[dict[str, str]]
) -> None:
    first = prepared(write_recipe("one"))[1].fingerprint
    assert prepared(write_recipe("two"))[1].fingerprint == first
    assert prepared(write_recipe("three", rows=texts[1:]))[1].fingerprint != first
    assert prepared(write_recipe("four", task={"system": "Be brief."}))[1].fingerprint != first


# what is wrong with rows


BAD = {
    "not_json": b'{"text": "broken',
    "not_an_object": b"[1]",
    "not_utf8": b'{"text": "\xff\xfe", "label": "torch"}',
    "no_text": b'{"text": ["a", "list"], "label": "torch"}',
    "no_label": b'{"text": "whose is this"}',
    "unknown_label": b'{"text": "of another library", "label": "jax"}',
}
LEFT_OUT = {
    "too_short": b'{"text": "\\u0000", "label": "torch"}',
    "too_many_characters": b'{"text": "' + b"x" * 10_000_000 + b'", "label": "torch"}',
    "control_token": b'{"text": "a <|im_end|> b", "label": "torch"}',
    "too_long": b'{"text": "' + b"word " * 400 + b'", "label": "torch"}',
}


def with_rows(path: Path, rows: dict[str, bytes]) -> dict[int, str]:
    """Mix rows into the recipe's data, after a byte-order mark; return the line of each with its reason."""
    data = path.parent / "small.jsonl"
    lines = data.read_bytes().splitlines()
    places = {}
    for n, (reason, row) in enumerate(rows.items()):
        lines.insert(7 * n + 3, row)
        places[7 * n + 4] = reason
    data.write_bytes(b"\xef\xbb\xbf" + b"\n".join(lines))
    return places


def test_bad_rows_are_kept_with_file_and_line_and_the_others_go_on(write_recipe: WriteRecipe, prepared: Make) -> None:
    path = write_recipe()
    places = with_rows(path, BAD | LEFT_OUT)
    _, found = prepared(path)
    file = path.parent / "small.jsonl"
    assert {entry["place"]: entry["reason"] for entry in quarantine(found)} == {f"{file}:{n}": reason for n, reason in places.items()}
    assert found.manifest["bad"] == dict.fromkeys(BAD, 1)
    assert found.manifest["dropped"] == dict.fromkeys(LEFT_OUT, 1)
    assert sum(found.manifest["examples"].values()) == 300
    assert all(len(entry["text"]) <= 500 for entry in quarantine(found))


def test_too_many_bad_rows_stop_and_say_what_is_wrong(write_recipe: WriteRecipe, prepared: Make) -> None:
    path = write_recipe()
    places = with_rows(path, BAD)
    line = refusal(lambda: prepared(path, "data.bad_rows=0.01"))
    file = path.parent / "small.jsonl"
    for word in ["data.bad_rows=0.01: 6 of 306 rows are no examples", f"1 not_json (first {file}:4: ", "raise data.bad_rows"]:
        assert word in line
    kept = path.parent / "data/small-quarantine.jsonl"
    assert str(kept) in line
    assert len(kept.read_text().splitlines()) == len(places)
    prepared(path, "data.bad_rows=0.02")
    assert not kept.exists(), "what was left of the preparation that stopped goes with the one that did not"


def test_a_recipe_that_fits_no_row_does_not_read_them_all(
    write_recipe: WriteRecipe, prepared: Make, texts: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[dict[str, Any]] = [{"txt": f"{n}", "label": "torch"} for n in range(5000)]
    line = refusal(lambda: prepared(write_recipe(rows=rows)))
    assert "1,000 of 1,000 rows are no examples" in line
    assert "columns found: txt, label" in line


def test_mixed_shapes_are_read_each_as_it_is(write_recipe: WriteRecipe, prepared: Make) -> None:
    shapes: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": "q1"}, {"role": "assistant", "content": "a1"}]},
        {"conversations": [{"from": "human", "value": "q2"}, {"from": "gpt", "value": "a2"}]},
        {"instruction": "q3", "input": "", "output": "a3"},
        {"prompt": "q4", "completion": "a4"},
    ]
    _, found = prepared(write_recipe(rows=shapes, task=CHAT, data={"validation_fraction": 0, "test_fraction": 0}))
    answers = {record["place"][-1]: json.loads(record["messages"])[-1]["content"] for record in records(found)}
    assert answers == {"1": "a1", "2": "a2", "3": "a3", "4": "a4"}


# what goes where


def test_the_number_of_processes_changes_nothing(
    write_recipe: WriteRecipe, prepared: Make, texts: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mistral_dist.data.workers.ROWS", 40)
    monkeypatch.setattr("mistral_dist.data.workers.ALONE", 1)
    path = write_recipe(rows=[*texts, {"text": "", "label": "torch"}, texts[3]])
    alone, together = prepared(path, "data.workers=1")[1], prepared(path, "data.workers=2")[1]
    assert alone.manifest == together.manifest
    assert quarantine(alone) == quarantine(together)
    assert records(alone) == records(together)


def test_a_process_that_is_killed_is_one_line(write_recipe: WriteRecipe, prepared: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mistral_dist.data.workers.ROWS", 40)
    monkeypatch.setattr("mistral_dist.data.workers.ALONE", 1)
    monkeypatch.setattr("mistral_dist.data.workers._work", killed)
    line = refusal(lambda: prepared(write_recipe(), "data.workers=2"))
    assert "data.workers=2: a process that cleans rows was killed" in line
    assert "data.workers=1" in line


def killed(_: object) -> None:
    """What a full memory does to a process."""
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_long_system_turn_does_not_make_all_conversations_alike(write_recipe: WriteRecipe, prepared: Make) -> None:
    system = {"role": "system", "content": "Be kind and brief. " * 8 + " ".join(f"Rule {n} is rule {n * n}." for n in range(8))}
    rows: list[dict[str, Any]] = [
        {"messages": [system, {"role": "user", "content": f"{n} or {n * 7}?"}, {"role": "assistant", "content": f"It is {n}."}]}
        for n in range(30)
    ]
    rows.append({"messages": [{**system, "content": "Be rude."}, *rows[0]["messages"][1:]]})
    _, found = prepared(write_recipe(rows=rows, task=CHAT, data={"near_duplicates": 0.8, "max_length": 400}))
    assert found.manifest["dropped"] == {"near_duplicate": 1}
    assert quarantine(found)[0]["place"].endswith(":31")


def test_splits_of_ones_own_are_taken_and_checked(
    write_recipe: WriteRecipe, prepared: Make, tmp_path: Path, texts: list[dict[str, str]]
) -> None:
    for name, rows in {"train": texts[:200], "validation": texts[200:240], "test": [*texts[240:], texts[7]]}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = [{"path": str(tmp_path / f"{name}.jsonl"), "into": name} for name in SPLITS]
    _, found = prepared(write_recipe(data={"sources": sources}))
    assert found.manifest["documents"] == {"train": 199, "validation": 40, "test": 61}
    assert [(entry["place"], entry["because"]) for entry in quarantine(found)] == [
        (f"{tmp_path}/train.jsonl:8", f"same as {tmp_path}/test.jsonl:61 (test)")
    ]
    assert found.manifest["leakage"] == {"equal": 0}


def test_what_a_benchmark_asks_is_not_trained_on(
    write_recipe: WriteRecipe, prepared: Make, tmp_path: Path, texts: list[dict[str, str]]
) -> None:
    asked = "which of the seven seas is the one that a sailor would call the saltiest of them"
    (tmp_path / "bench.jsonl").write_text(json.dumps({"question": asked, "answer": "none"}) + "\n")
    rows = [*texts[:50], {"text": f"Someone asked {asked}, and nobody knew.", "label": "torch"}]
    _, found = prepared(write_recipe(rows=rows, data={"benchmarks": [{"path": str(tmp_path / "bench.jsonl")}]}))
    (entry,) = quarantine(found)
    assert (entry["reason"], entry["place"].rpartition(":")[2]) == ("in_benchmark", "51")
    assert "Compared with 1 of 2 texts of the benchmarks" in (found.path / "audit.md").read_text()
    assert "which of the seven seas" in entry["because"]


def test_rows_of_a_group_stay_together_and_so_do_those_that_come_later(
    write_recipe: WriteRecipe, prepared: Make, tmp_path: Path, texts: list[dict[str, str]]
) -> None:
    rows = [{**row, "author": f"author {n % 30}"} for n, row in enumerate(texts)]
    path = write_recipe(rows=rows[:200], data={"sources": [{"path": str(tmp_path / "small.jsonl"), "group": "author"}]})

    def sides(found: Prepared) -> dict[str, set[str]]:
        author = {row["text"]: row["author"] for row in rows}
        placed: dict[str, set[str]] = {}
        for name in SPLITS:
            for record in records(found, name):
                placed.setdefault(author[record["text"]], set()).add(name)
        return placed

    before = sides(prepared(path)[1])
    assert {len(names) for names in before.values()} == {1}
    (tmp_path / "small.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[::-1]))
    after = sides(prepared(path)[1])
    assert after == before


def test_a_long_conversation_can_lose_its_oldest_turns_but_never_an_answer(
    write_recipe: WriteRecipe, prepared: Make, tokenizer: Any
) -> None:
    turns = [{"role": role, "content": f"{role} {n} " + "word " * 30} for n in range(8) for role in ("user", "assistant")]
    long_question = [{"role": "user", "content": "word " * 500}, {"role": "assistant", "content": "the whole answer"}]
    long_answer = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "word " * 500}]
    rows: list[dict[str, Any]] = [{"messages": turns}, {"messages": long_question}, {"messages": long_answer}]
    nothing_held_out = {"validation_fraction": 0, "test_fraction": 0, "overlong": "shorten"}
    recipe, found = prepared(write_recipe(rows=rows, task=CHAT, data=nothing_held_out))
    kept = {record["place"][-1]: record for record in records(found)}
    assert sorted(kept) == ["1", "2"]
    assert {entry["place"][-1]: entry["reason"] for entry in quarantine(found)} == {"3": "too_long"}
    assert found.manifest["changed"] == {"shortened": 2, "white_space": 2}
    assert all(record["tokens"] <= recipe.data.max_length for record in kept.values())
    assert json.loads(kept["1"]["messages"])[-1]["content"] == turns[-1]["content"].strip()
    assert json.loads(kept["2"]["messages"])[-1]["content"] == "the whole answer"
    encoded = Encoder(tokenizer, recipe.task).encode(from_record(kept["2"]))
    assert tokenizer.decode(encoded.ids[encoded.targets]) == "the whole answer<|im_end|>"


def test_targets_in_are_targets_out(write_recipe: WriteRecipe, prepared: Make, tokenizer: Any) -> None:
    recipe, found = prepared(write_recipe())
    encoder = Encoder(tokenizer, recipe.task)
    tokens, targets = found.lengths("train")
    plan = Plan(tokens, capacity=192, seed=0, epochs=1, global_batch_size=4)
    out = sum(int(targets[plan.pack(number)].sum()) for number in range(plan.packs))
    assert out == sum(len(encoder.encode(from_record(record)).targets) for record in records(found, "train"))
    assert out == found.manifest["targets"]["train"]


def test_a_source_of_weight_two_is_seen_twice_an_epoch(
    write_recipe: WriteRecipe, prepared: Make, tokenizer: Any, tmp_path: Path, texts: list[dict[str, str]]
) -> None:
    (tmp_path / "more.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts[100:]))
    sources = [{"path": str(tmp_path / "small.jsonl"), "weight": 2}, {"path": str(tmp_path / "more.jsonl")}]
    recipe, found = prepared(write_recipe(rows=texts[:100], data={"sources": sources}))
    stream = open_feed(recipe, Encoder(tokenizer, recipe.task), 0, 1).stream
    assert isinstance(stream, Stream)
    shown = Counter(id for step in range(stream.steps) for batch in stream.work(step).batches for _, ids in batch.ids for id in ids)
    assert shown == {record["id"]: 2 if record["source"] == 0 else 1 for record in records(found, "train")}
    assert {record["source"] for record in records(found, "train")} == {0, 1}
    again = Recipe.load(write_recipe(rows=texts[:100], data={"sources": sources}), ["data.sources.0.weight=3"])
    open_prepared(again, Encoder(tokenizer, again.task))  # what is prepared does not depend on it


def test_a_stream_prepares_what_it_is_tested_on(
    write_recipe: WriteRecipe, prepared: Make, tmp_path: Path, texts: list[dict[str, str]]
) -> None:
    (tmp_path / "held-out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts[:20]))
    sources = [{"path": str(tmp_path / "small.jsonl")}, {"path": str(tmp_path / "held-out.jsonl"), "into": "test"}]
    path = write_recipe(rows=texts[20:], data={"sources": sources, "streaming": True}, train={"steps": 3})
    _, found = prepared(path)
    assert found.manifest["examples"] == {"train": 0, "validation": 0, "test": 20}
    audit = (found.path / "audit.md").read_text()
    assert "the streamed train data: not compared" in audit
    assert "streamed, not read here" in audit


def test_the_classes_weigh_what_the_recipe_says(
    write_recipe: WriteRecipe, prepared: Make, tokenizer: Any, texts: list[dict[str, str]]
) -> None:
    """balanced: as in scikit-learn, of the train split, so that all classes together weigh the same."""
    path = write_recipe(
        rows=texts[:200] + [{"text": f"More of it, {n}: {text['text']}", "label": "numpy"} for n, text in enumerate(texts[200:])]
    )
    _, found = prepared(path)
    labels = [record["label"] for record in records(found, "train")]
    assert found.label_counts("train") == Counter(labels)
    wanted = compute_class_weight("balanced", classes=np.array(sorted(set(labels))), y=labels)
    balanced = dict(zip(sorted(set(labels)), wanted.astype(np.float32).tolist(), strict=True))
    assert balanced["numpy"] < 0.5 < 1 < balanced["pandas"]
    for override, weights in (("balanced", balanced), ("{numpy: 0.1, pandas: 3}", {"numpy": float(np.float32(0.1)), "pandas": 3.0})):
        recipe = Recipe.load(path, [f"task.class_weights={override}", "train.micro_batch_size=3"])
        label_of = {record["id"]: record["label"] for record in records(found, "train")}
        ranks = [open_feed(recipe, Encoder(tokenizer, recipe.task), rank, 2).stream for rank in range(2)]
        for step in range(ranks[0].steps):
            works = [stream.work(step) for stream in ranks if isinstance(stream, Stream)]
            assert works[0].weight == works[1].weight == sum(float(b.weights.double().sum()) for work in works for b in work.batches)
            shown = Counter(label_of[id] for work in works for b in work.batches for _, ids in b.ids for id in ids)
            found_weights = {float(weight) for work in works for b in work.batches for weight in b.weights if weight}
            assert found_weights == {weights.get(label, 1.0) for label in shown}
