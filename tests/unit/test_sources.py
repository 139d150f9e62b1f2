"""Real files through the real reader: rows in order, each with a place that a person can look up."""

import bz2
import gzip
import json
import lzma
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from mistral_dist.config import Source
from mistral_dist.data.sources import check, read, state
from mistral_dist.errors import DataError, UserError

ROWS = [{"text": "eins", "label": "a"}, {"text": "zwei, drei", "label": "b"}, {"text": 'vier "fünf"', "label": "a"}]


@pytest.fixture(autouse=True)
def cache_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def source(path: Path, **columns: str) -> tuple[Source]:
    return (Source(path=str(path), columns=columns),)


def rows(path: Path, **columns: str) -> list[tuple[str, dict[str, Any]]]:
    return [(row.place, row.values) for row in read(source(path, **columns))]


def refusal(action: Callable[[], object]) -> str:
    with pytest.raises(DataError) as caught:
        action()
    assert isinstance(caught.value, UserError)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def jsonl(file: Path, values: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in values), encoding="utf-8")
    return file


# formats


def test_json_lines_have_lines(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "f.jsonl", ROWS)
    assert rows(file) == [(f"{file}:{n}", row) for n, row in enumerate(ROWS, 1)]


@pytest.mark.parametrize("indent", [None, 2])
def test_json_has_rows(tmp_path: Path, indent: int | None) -> None:
    file = tmp_path / "f.json"
    file.write_text(json.dumps(ROWS, indent=indent))
    assert rows(file) == [(f"{file} row {n}", row) for n, row in enumerate(ROWS, 1)]


def test_csv_has_rows(tmp_path: Path) -> None:
    file = tmp_path / "f.csv"
    file.write_text('text,label\neins,a\n"zwei, drei",b\n"vier ""fünf""",a\n', encoding="utf-8")
    assert rows(file) == [(f"{file} row {n}", row) for n, row in enumerate(ROWS, 1)]


def test_parquet_has_rows(tmp_path: Path) -> None:
    file = tmp_path / "f.parquet"
    datasets.Dataset.from_list(ROWS).to_parquet(file)
    assert rows(file) == [(f"{file} row {n}", row) for n, row in enumerate(ROWS, 1)]


def test_text_has_lines(tmp_path: Path) -> None:
    file = tmp_path / "f.txt"
    file.write_text("first\n\nthird ü\nlast without an end", encoding="utf-8")
    assert rows(file) == [
        (f"{file}:1", {"text": "first"}),
        (f"{file}:2", {"text": ""}),
        (f"{file}:3", {"text": "third ü"}),
        (f"{file}:4", {"text": "last without an end"}),
    ]


def test_a_markdown_file_is_one_text(tmp_path: Path) -> None:
    file = tmp_path / "f.md"
    file.write_text("# Title\n\nA line.\n\n- a point\n")
    ((place, values),) = rows(file)
    assert place.startswith(str(file))
    assert values["text"].rstrip("\n") == "# Title\n\nA line.\n\n- a point"


@pytest.mark.parametrize(("ending", "opened"), [(".gz", gzip.open), (".bz2", bz2.open), (".xz", lzma.open)])
def test_compressed_files_are_read_as_they_are(tmp_path: Path, ending: str, opened: Callable[..., Any]) -> None:
    file = tmp_path / f"f.jsonl{ending}"
    with opened(file, "wt", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in ROWS)
    assert rows(file) == [(f"{file}:{n}", row) for n, row in enumerate(ROWS, 1)]


def test_a_file_name_with_dots_brackets_and_stars_is_only_a_name(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "v1.2 [new] *final.jsonl", ROWS)
    jsonl(tmp_path / "v1.2 n xfinal.jsonl", [{"text": "another file"}])
    assert [values for _, values in rows(file)] == ROWS


def test_conversations_stay_lists_of_turns(tmp_path: Path) -> None:
    turns = [[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}], [{"role": "user", "content": "again"}]]
    file = jsonl(tmp_path / "f.jsonl", [{"messages": turn} for turn in turns])
    assert [values["messages"] for _, values in rows(file)] == turns


def test_an_empty_line_in_json_lines_does_not_move_the_places_after_it(tmp_path: Path) -> None:
    file = tmp_path / "f.jsonl"
    file.write_text('{"text": "one"}\n\n{"text": "three"}\n')
    assert [(place, values["text"]) for place, values in rows(file)] == [(f"{file}:1", "one"), (f"{file}:3", "three")]


@pytest.mark.parametrize("text", ["NA", "null", "None", "n/a", "007", "1e5", "2024-01-31", "true"])
@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_a_text_that_looks_like_something_else_is_a_text(tmp_path: Path, ending: str, text: str) -> None:
    file = tmp_path / f"f.{ending}"
    file.write_text(f'text\n"{text}"\n' if ending == "csv" else json.dumps({"text": text}) + "\n")
    assert [values for _, values in rows(file)] == [{"text": text}]


# folders and several sources


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a/z.jsonl", "c.jsonl.gz", "a.csv", "notes.pdf"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
    jsonl(tmp_path / "in" / "b.jsonl", [{"text": "2"}])
    jsonl(tmp_path / "in" / "a" / "z.jsonl", [{"text": "1"}])
    (tmp_path / "in" / "c.jsonl.gz").write_bytes(gzip.compress(b'{"text": "3"}\n'))
    (tmp_path / "in" / "notes.pdf").write_bytes(b"no data")
    assert [(Path(place).name, values["text"]) for place, values in rows(tmp_path / "in")] == [
        ("z.jsonl:1", "1"),
        ("b.jsonl:1", "2"),
        ("c.jsonl.gz:1", "3"),
    ]


def test_files_of_a_folder_may_have_different_columns(tmp_path: Path) -> None:
    jsonl(tmp_path / "a.jsonl", [{"text": "1", "more": 1}])
    jsonl(tmp_path / "b.jsonl", [{"text": "2"}])
    assert [values for _, values in rows(tmp_path)] == [{"text": "1", "more": 1}, {"text": "2"}]


def test_sources_are_read_in_their_order(tmp_path: Path) -> None:
    files = [jsonl(tmp_path / name, [{"text": name}]) for name in ("b.jsonl", "a.jsonl")]
    assert [row.values["text"] for row in read(source(files[0]) + source(files[1]))] == ["b.jsonl", "a.jsonl"]


# columns


def test_columns_are_mapped_and_the_others_stay(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "f.jsonl", [{"review": "good", "stars": 5, "more": "x"}])
    ((_, values),) = rows(file, text="review", label="stars")
    assert (values["text"], values["label"], values["more"]) == ("good", 5, "x")


def test_two_columns_can_change_places(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "f.jsonl", [{"text": "a label", "label": "a text"}])
    assert rows(file, text="label", label="text")[0][1] == {"text": "a text", "label": "a label"}


def test_a_mapped_column_that_is_not_there_is_refused_with_those_that_are(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "f.jsonl", [{"review": "good", "stars": 5}])
    line = refusal(lambda: rows(file, text="reviews"))
    for word in [f"{file}:1", "'reviews'", "data.sources.columns", "review, stars"]:
        assert word in line


# refusals


def test_a_missing_file_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    line = refusal(lambda: check(source(jsonl(tmp_path / "a.jsonl", ROWS)) + source(tmp_path / "no.jsonl")))
    for word in [str(tmp_path / "no.jsonl"), "no such file", "data.sources"]:
        assert word in line


@pytest.mark.parametrize("name", ["f.pdf", "f.xlsx", "f", "f.gz"])
def test_an_unknown_format_is_refused_with_the_known_ones(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    line = refusal(lambda: check(source(tmp_path / name)))
    for word in [str(tmp_path / name), "unknown format", ".jsonl", ".parquet"]:
        assert word in line


def test_a_folder_without_data_is_refused(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "x.pdf").write_bytes(b"x")
    line = refusal(lambda: check(source(tmp_path / "in")))
    assert str(tmp_path / "in") in line
    assert ".jsonl" in line


@pytest.mark.parametrize("name", ["f.jsonl", "f.json", "f.csv", "f.txt", "f.md", "f.jsonl.gz"])
def test_an_empty_file_is_refused_by_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(gzip.compress(b"") if name.endswith(".gz") else b"")
    assert str(tmp_path / name) in refusal(lambda: rows(tmp_path / name))


@pytest.mark.parametrize("name", ["f.csv", "f.parquet"])
def test_a_file_with_columns_and_no_rows_is_refused_by_name(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    if name == "f.csv":
        file.write_text("text,label\n")
    else:
        datasets.Dataset.from_dict({"text": []}, features=datasets.Features({"text": datasets.Value("string")})).to_parquet(file)
    line = refusal(lambda: rows(file))
    assert str(file) in line
    assert "empty" in line


@pytest.mark.parametrize("broken", ['{"text": "thr', "no json at all", '{"text": }'])
def test_a_broken_line_of_json_is_one_line_with_the_file(tmp_path: Path, broken: str) -> None:
    file = tmp_path / "f.jsonl"
    file.write_text(f'{{"text": "one"}}\n{{"text": "two"}}\n{broken}\n')
    line = refusal(lambda: rows(file))
    assert str(file) in line
    assert "mend" in line


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("f.json", b'[{"text": "one"},'),
        ("f.parquet", b"this is no parquet"),
        ("f.jsonl.gz", b"this is no gzip"),
        ("f.csv", b'text,label\n"one,a\n'),
        ("f.jsonl", b'{"text": "\xff\xfe"}\n'),
        ("f.txt", b"\xff\xfe\xfd\n"),
    ],
)
def test_a_damaged_file_is_one_line_with_its_name(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert str(tmp_path / name) in refusal(lambda: rows(tmp_path / name))


# state


def test_the_state_changes_when_a_file_does(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "a.jsonl", ROWS)
    before = state(source(tmp_path))
    assert list(before) == [str(file)]
    assert state(source(tmp_path)) == before

    os.utime(file, ns=(0, 1))
    touched = state(source(tmp_path))
    assert touched != before

    stamp = file.stat()
    jsonl(file, ROWS[:2])
    os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    shorter = state(source(tmp_path))
    assert shorter != touched

    jsonl(tmp_path / "b.jsonl", ROWS)
    assert len(state(source(tmp_path))) == 2


def test_the_state_survives_a_manifest(tmp_path: Path) -> None:
    found = state(source(jsonl(tmp_path / "a.jsonl", ROWS)))
    assert json.loads(json.dumps(found)) == found
