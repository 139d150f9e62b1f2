"""Real files through the real reader: rows in order, each with a place that a person can look up."""

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from mistral_dist.config import Source
from mistral_dist.data import formats
from mistral_dist.data.example import Row
from mistral_dist.data.sources import check, read, shards, state
from mistral_dist.errors import DataError, UserError

ROWS = [{"text": "eins", "label": "a"}, {"text": "zwei, drei", "label": "b"}, {"text": 'vier "fünf"', "label": "a"}]


@pytest.fixture(autouse=True)
def cache_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def source(path: Path, **columns: str) -> Source:
    return Source(path=str(path), columns=columns)


def values(row: Row) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(row.payload) if isinstance(row.payload, bytes) else row.payload
    return found


def rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    return [(row.place, values(row)) for row in read(source(path))]


def raw(path: Path) -> list[bytes | dict[str, Any]]:
    return [row.payload for row in read(source(path))]


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
    ((place, columns),) = rows(file)
    assert place.startswith(str(file))
    assert columns["text"].rstrip("\n") == "# Title\n\nA line.\n\n- a point"


@pytest.mark.parametrize(("ending", "opened"), [(".gz", gzip.open), (".bz2", bz2.open), (".xz", lzma.open), (".zst", zstandard.open)])
def test_compressed_files_are_read_as_they_are(tmp_path: Path, ending: str, opened: Callable[..., Any]) -> None:
    file = tmp_path / f"f.jsonl{ending}"
    with opened(file, "wt", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in ROWS)
    assert rows(file) == [(f"{file}:{n}", row) for n, row in enumerate(ROWS, 1)]


def test_a_file_name_with_dots_brackets_and_stars_is_only_a_name(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "v1.2 [new] *final.jsonl", ROWS)
    jsonl(tmp_path / "v1.2 n xfinal.jsonl", [{"text": "another file"}])
    assert [columns for _, columns in rows(file)] == ROWS


def test_conversations_stay_lists_of_turns(tmp_path: Path) -> None:
    turns = [[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}], [{"role": "user", "content": "again"}]]
    file = jsonl(tmp_path / "f.jsonl", [{"messages": turn} for turn in turns])
    assert [columns["messages"] for _, columns in rows(file)] == turns


def test_an_empty_line_in_json_lines_does_not_move_the_places_after_it(tmp_path: Path) -> None:
    file = tmp_path / "f.jsonl"
    file.write_text('{"text": "one"}\n\n{"text": "three"}\n')
    assert [(place, columns["text"]) for place, columns in rows(file)] == [(f"{file}:1", "one"), (f"{file}:3", "three")]


@pytest.mark.parametrize("text", ["NA", "null", "None", "n/a", "007", "1e5", "2024-01-31", "true"])
@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_a_text_that_looks_like_something_else_is_a_text(tmp_path: Path, ending: str, text: str) -> None:
    file = tmp_path / f"f.{ending}"
    file.write_text(f'text\n"{text}"\n' if ending == "csv" else json.dumps({"text": text}) + "\n")
    assert [columns for _, columns in rows(file)] == [{"text": text}]


# folders and several sources


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a/z.jsonl", "c.jsonl.gz", "a.csv", "notes.pdf"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
    jsonl(tmp_path / "in" / "b.jsonl", [{"text": "2"}])
    jsonl(tmp_path / "in" / "a" / "z.jsonl", [{"text": "1"}])
    (tmp_path / "in" / "c.jsonl.gz").write_bytes(gzip.compress(b'{"text": "3"}\n'))
    (tmp_path / "in" / "notes.pdf").write_bytes(b"no data")
    assert [(Path(place).name, columns["text"]) for place, columns in rows(tmp_path / "in")] == [
        ("z.jsonl:1", "1"),
        ("b.jsonl:1", "2"),
        ("c.jsonl.gz:1", "3"),
    ]


def test_files_of_a_folder_may_have_different_columns(tmp_path: Path) -> None:
    jsonl(tmp_path / "a.jsonl", [{"text": "1", "more": 1}])
    jsonl(tmp_path / "b.jsonl", [{"text": "2"}])
    assert [columns for _, columns in rows(tmp_path)] == [{"text": "1", "more": 1}, {"text": "2"}]


def test_a_pattern_stands_for_the_files_that_fit(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "c.txt", ".hidden.jsonl", "d/e.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        jsonl(tmp_path / name, [{"text": name}])
    (tmp_path / "f.jsonl.pdf").write_bytes(b"no data")
    assert [columns["text"] for _, columns in rows(tmp_path / "*.jsonl*")] == ["a.jsonl", "b.jsonl"]
    assert [columns["text"] for _, columns in rows(tmp_path / "**" / "*.jsonl")] == ["a.jsonl", "b.jsonl", "d/e.jsonl"]
    assert "no file fits" in refusal(lambda: check([source(tmp_path / "*.parquet")]))


@pytest.mark.parametrize("given", ["in", "in/**/*.jsonl", "file://in", "file://in/**/*.jsonl"])
def test_prepared_data_and_hidden_files_in_a_folder_are_no_source(tmp_path: Path, given: str) -> None:
    folder = tmp_path / "in"
    for name in ("a.jsonl", "data/quarantine.jsonl", "data/train/x.jsonl", ".git/x.jsonl"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        jsonl(folder / name, [{"text": name}])
    (folder / "data" / "manifest.json").write_text("{}")
    path = given.replace("in", str(folder), 1)
    found = [values(row)["text"] for row in read(Source(path=path))]
    assert found == ["a.jsonl"]


# what is wrong with one row is left in the row


def test_columns_keep_their_names_and_lines_of_json_their_bytes(tmp_path: Path) -> None:
    file = tmp_path / "f.jsonl"
    file.write_bytes(b' {"review": "good", "stars": 5}\r\n')
    assert [row.payload for row in read(source(file, text="review"))] == [b' {"review": "good", "stars": 5}']


@pytest.mark.parametrize("broken", [b'{"text": "thr', b"no json at all", b"[1, 2]", b'{"text": "\xff\xfe"}', b'\x00{"text": 1}'])
def test_a_broken_line_of_json_stays_as_it_is(tmp_path: Path, broken: bytes) -> None:
    file = tmp_path / "f.jsonl"
    file.write_bytes(b'{"text": "one"}\n' + broken + b'\n{"text": "three"}\n')
    assert raw(file) == [b'{"text": "one"}', broken, b'{"text": "three"}']


@pytest.mark.parametrize("name", ["f.txt", "f.csv", "f.json", "f.md"])
def test_bytes_that_are_no_utf8_can_be_told_from_text(tmp_path: Path, name: str) -> None:
    content = {"f.csv": b"text\nab\xffc\n", "f.json": b'[{"text": "ab\xffc"}]'}.get(name, b"ab\xffc\n")
    (tmp_path / name).write_bytes(content)
    ((_, columns),) = rows(tmp_path / name)
    assert columns["text"].encode("utf-8", "surrogateescape") == b"ab\xffc"
    with pytest.raises(UnicodeEncodeError):
        columns["text"].encode()


def test_a_csv_row_with_other_cells_than_the_header_is_as_the_standard_library_has_it(tmp_path: Path) -> None:
    file = tmp_path / "f.csv"
    file.write_text("a,b,c\n1,2,3\n1\n\n1,2,3,4,5\n,,\n")
    assert raw(file) == [dict(row) for row in csv.DictReader(io.StringIO(file.read_text()))]
    assert raw(file)[2] == {"a": "1", "b": "2", "c": "3", None: ["4", "5"]}


def test_a_csv_row_with_text_after_a_quote_is_marked_and_the_others_are_read(tmp_path: Path) -> None:
    file = tmp_path / "f.csv"
    file.write_text('a,b\n1,2\n"x" y,2\n3,4\n')
    first, bad, last = raw(file)
    assert (first, last) == ({"a": "1", "b": "2"}, {"a": "3", "b": "4"})
    assert isinstance(bad, dict) and "no CSV" in bad[None][0]  # type: ignore[index]


def test_nul_bytes_in_csv_are_text(tmp_path: Path) -> None:
    file = tmp_path / "f.csv"
    file.write_bytes(b"a,b\n1\x00,2\n3,4\n")
    assert raw(file) == [{"a": "1\x00", "b": "2"}, {"a": "3", "b": "4"}]


@pytest.mark.parametrize(
    ("header", "columns"),
    [("a;b", ["a", "b"]), ("a\tb", ["a", "b"]), ("a,b;c", ["a", "b;c"]), ('"a;b"', ["a;b"]), ('"a,x";b', ["a,x", "b"]), ("a", ["a"])],
)
def test_the_delimiter_is_a_comma_unless_the_header_has_none(tmp_path: Path, header: str, columns: list[str]) -> None:
    file = tmp_path / "f.csv"
    delimiter = next((sign for sign in ",;\t" if header.count(sign) and len(columns) > 1 and header != '"a,x";b'), ";")
    file.write_text(f"{header}\n{delimiter.join('x' * len(columns))}\n")
    assert raw(file) == [dict.fromkeys(columns, "x")]


def test_a_cell_may_be_as_long_as_a_book(tmp_path: Path) -> None:
    file = tmp_path / "f.csv"
    file.write_text("text\n" + "x" * 300_000 + "\n")
    assert raw(file) == [{"text": "x" * 300_000}]


@pytest.mark.parametrize("name", ["f.jsonl", "f.csv", "f.txt", "f.json", "f.md", "f.jsonl.gz"])
def test_a_byte_order_mark_is_dropped(tmp_path: Path, name: str) -> None:
    kinds = {".csv": b"text\nx\n", ".txt": b"x\n", ".json": b'[{"text": "x"}]', ".md": b"x\n"}
    content = codecs.BOM_UTF8 + kinds.get(Path(name).suffix, b'{"text": "x"}\n')
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert [columns for _, columns in rows(tmp_path / name)] == [{"text": "x"}]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be"])
@pytest.mark.parametrize("name", ["f.jsonl", "f.csv", "f.txt", "f.json"])
def test_utf16_is_refused_with_the_remedy(tmp_path: Path, name: str, encoding: str) -> None:
    mark = codecs.BOM_UTF16_BE if encoding.endswith("be") else b""
    (tmp_path / name).write_bytes(mark + '{"text": "x"}\n'.encode(encoding))
    line = refusal(lambda: rows(tmp_path / name))
    for word in [str(tmp_path / name), "UTF-16", "convert it to UTF-8"]:
        assert word in line


# positions

TEXTS = st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\n"), max_size=12), min_size=1, max_size=30)


def written(name: str, texts: list[str], folder: Path) -> Path:
    file = folder / name
    plain = "".join(json.dumps({"text": text}, ensure_ascii=len(text) % 2 == 0) + "\n" * (1 + len(text) % 3) for text in texts)
    if ".jsonl" in name:
        data = plain.encode()
        pressed = {".gz": gzip.compress, ".zst": lambda data: zstandard.ZstdCompressor().compress(data)}.get(file.suffix)
        file.write_bytes(pressed(data) if pressed else data)
    elif name.endswith(".csv"):
        with file.open("w", encoding="utf-8", newline="") as stream:
            csv.writer(stream).writerows([["text", "n"], *([text + '"\n"' * (len(text) % 2), n] for n, text in enumerate(texts))])
    elif name.endswith(".txt"):
        file.write_text("\n".join(texts) + "\n", encoding="utf-8", newline="")
    elif name.endswith(".json"):
        file.write_text(json.dumps([{"text": text} for text in texts], indent=1), encoding="utf-8")
    else:
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), file, row_group_size=7)
    return file


@pytest.mark.parametrize("name", ["f.jsonl", "f.jsonl.gz", "f.jsonl.zst", "f.csv", "f.txt", "f.json", "f.parquet"])
@given(texts=TEXTS, data=st.data())
@settings(max_examples=40, deadline=None)
def test_reading_from_the_position_after_a_row_gives_the_rows_after_it(
    tmp_path_factory: pytest.TempPathFactory, name: str, texts: list[str], data: st.DataObject
) -> None:
    (shard,) = shards(Source(path=str(written(name, texts, tmp_path_factory.mktemp("rows")))))
    found = list(shard.rows())
    assert len(found) == len(texts)
    k = data.draw(st.integers(1, len(found)))
    again = list(shard.rows(found[k - 1][0]))
    assert [(position, row.payload) for position, row in again] == [(position, row.payload) for position, row in found[k:]]
    if not formats.seeks_by_bytes(name):
        assert again == found[k:]


def test_after_a_byte_offset_a_place_is_the_byte_at_which_the_line_begins(tmp_path: Path) -> None:
    file = tmp_path / "f.jsonl"
    file.write_bytes(b'{"a": 1}\n\n{"a": 2}\n{"a": 3}')
    (shard,) = shards(Source(path=str(file)))
    ((first, _), *_) = shard.rows()
    assert first == 9
    assert [row.place for _, row in shard.rows(first)] == [f"{file}@byte 10", f"{file}@byte 19"]


def test_row_groups_before_the_position_are_not_read(tmp_path: Path) -> None:
    file = tmp_path / "f.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": [f"{n} " + "x" * 100 for n in range(20)]}), file, row_group_size=5)
    (shard,) = shards(Source(path=str(file)))
    whole = [row for _, row in shard.rows()]
    metadata = pyarrow.parquet.read_metadata(file)
    begin, end = (metadata.row_group(group).column(0).dictionary_page_offset or 4 for group in (0, 2))
    data = bytearray(file.read_bytes())
    data[begin:end] = bytes(end - begin)  # whoever reads the first two groups finds damage
    file.write_bytes(data)
    assert [row for _, row in shard.rows(10)] == whole[10:]
    assert [row for _, row in shard.rows(13)] == whole[13:]
    assert str(file) in refusal(lambda: list(shard.rows(9)))


@pytest.mark.parametrize("start", [0, 3])
def test_a_shard_can_be_sent_to_another_process(tmp_path: Path, start: int) -> None:
    (shard,) = shards(Source(path=str(written("f.csv", ["a", "b", "c", "d"], tmp_path))))
    assert list(pickle.loads(pickle.dumps(shard)).rows(start)) == list(shard.rows(start))


# values


def test_a_file_of_several_frames_is_read_whole(tmp_path: Path) -> None:
    file = tmp_path / "f.jsonl.zst"
    frames = [zstandard.ZstdCompressor().compress((json.dumps(row) + "\n").encode()) for row in ROWS]
    file.write_bytes(frames[0] + b"\x50\x2a\x4d\x18\x03\x00\x00\x00abc" + frames[1] + frames[2])  # one that is to be skipped
    assert [columns for _, columns in rows(file)] == ROWS


@pytest.mark.parametrize("size", [10, formats.CHUNK - 9, formats.CHUNK, 3 * formats.CHUNK])
def test_a_json_array_is_the_same_however_it_is_cut_for_reading(tmp_path: Path, size: int) -> None:
    file = tmp_path / "f.json"
    objects = [{"text": "é" * size, "n": -1.5e300}, {"text": ']}"\\'}, {"list": [[], {}], "null": None}] * 3
    file.write_text(json.dumps(objects, indent=2) + "\n\n", encoding="utf-8")
    assert raw(file) == objects


def test_json_objects_one_after_the_other_are_rows_too(tmp_path: Path) -> None:
    file = tmp_path / "f.json"
    file.write_text('{"a": 1}\n{"a": 2} {"a": 3}')
    assert raw(file) == [{"a": 1}, {"a": 2}, {"a": 3}]


def test_elements_of_an_array_that_are_no_objects_are_left_for_their_refusal(tmp_path: Path) -> None:
    file = tmp_path / "f.json"
    file.write_text('[{"a": 1}, 12, "x"]')
    assert raw(file) == [{"a": 1}, b"12", b'"x"']


# refusals


def test_a_missing_file_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    line = refusal(lambda: check([source(jsonl(tmp_path / "a.jsonl", ROWS)), source(tmp_path / "no.jsonl")]))
    for word in [str(tmp_path / "no.jsonl"), "no such file", "data.sources"]:
        assert word in line


@pytest.mark.parametrize("name", ["f.pdf", "f.xlsx", "f", "f.gz"])
def test_an_unknown_format_is_refused_with_the_known_ones(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    line = refusal(lambda: check([source(tmp_path / name)]))
    for word in [str(tmp_path / name), "unknown format", ".jsonl", ".parquet"]:
        assert word in line


def test_a_folder_without_data_is_refused(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "x.pdf").write_bytes(b"x")
    line = refusal(lambda: check([source(tmp_path / "in")]))
    assert str(tmp_path / "in") in line
    assert ".jsonl" in line


@pytest.mark.parametrize("name", ["f.jsonl", "f.json", "f.csv", "f.txt", "f.md", "f.jsonl.gz"])
def test_an_empty_file_is_refused_by_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(gzip.compress(b"") if name.endswith(".gz") else b"")
    assert str(tmp_path / name) in refusal(lambda: rows(tmp_path / name))


def test_an_empty_file_among_others_is_passed_over(tmp_path: Path) -> None:
    for name in ("a.jsonl", "c.csv", "d.jsonl"):
        (tmp_path / name).write_bytes(b"")
    jsonl(tmp_path / "b.jsonl", ROWS)
    assert [columns for _, columns in rows(tmp_path)] == ROWS
    assert [len(list(shard.rows())) for shard in shards(source(tmp_path))] == [0, 3, 0, 0]


def test_a_folder_of_nothing_but_empty_files_is_refused_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a.jsonl", "b.jsonl"):
        (folder / name).write_bytes(b"")
    assert refusal(lambda: list(read(source(folder)))).startswith(f"{folder}: empty")


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


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("f.json", b'[{"text": "one"},'),
        ("f.json", b'[{"text": "one"}'),
        ("f.json", b'[{"text": "one"},]'),
        ("f.json", b'[{"text": "one"}] {}'),
        ("f.json", b'{"text": "one"}\n{"text":'),
        ("f.json", b'{"text": "one"}]'),
        ("f.json", b"[" * 100_000),
        ("f.parquet", b"this is no parquet"),
        ("f.jsonl.gz", b"this is no gzip"),
        ("f.csv", b'text,label\n"one,a\n'),
        ("f.csv", b"text,text\n1,2\n"),
        ("f.jsonl.gz", gzip.compress(b'{"text": "one"}\n' * 1000)[:-12]),
        ("f.jsonl.gz", gzip.compress(b'{"text": "one"}\n') + b"more"),
        ("f.jsonl.zst", zstandard.ZstdCompressor().compress(b'{"text": "one"}\n' * 1000)[:-3]),
        ("f.jsonl.zst", zstandard.ZstdCompressor().compress(b'{"text": "one"}\n') + b"more than a header"),
        ("f.jsonl.xz", lzma.compress(b'{"text": "one"}\n' * 1000)[:-3]),
        ("f.jsonl.bz2", bz2.compress(b'{"text": "one"}\n' * 1000)[:-3]),
        ("f.txt", b"\xff\xfe\xfd\n"),
    ],
)
def test_a_damaged_file_is_one_line_with_its_name(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert str(tmp_path / name) in refusal(lambda: raw(tmp_path / name))


def test_a_file_that_breaks_off_names_the_last_row_that_was_whole(tmp_path: Path) -> None:
    file = tmp_path / "f.csv"
    file.write_text('a,b\n1,2\n3,4\n5,"6\n7,8\n')
    line = refusal(lambda: raw(file))
    for word in [str(file), "after", "row 2", "row 3", "never closed"]:
        assert word in line


# hub data sets: any folder that `datasets` reads has a name there


@pytest.fixture
def hub_set(tmp_path: Path) -> str:
    folder = tmp_path / "set"
    folder.mkdir()
    for part in range(3):
        pyarrow.parquet.write_table(pyarrow.table({"text": [f"{part}{n}" for n in range(4)]}), folder / f"train-{part}-of-3.parquet")
    return str(folder)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_hub_data_set_has_its_rows_in_order_and_can_be_sought(hub_set: str, streaming: bool) -> None:
    given = Source(name=hub_set, streaming=streaming)
    found = shards(given)
    assert len(found) == (3 if streaming else 1)
    assert [values(row)["text"] for row in read(given)] == [f"{part}{n}" for part in range(3) for n in range(4)]
    for shard in found:
        whole = list(shard.rows())
        assert [position for position, _ in whole] == list(range(1, len(whole) + 1))
        assert len({row.place for _, row in whole}) == len(whole)
        assert list(shard.rows(3)) == whole[3:]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_hub_data_set_that_is_not_there_is_one_line_with_its_name(streaming: bool, tmp_path: Path) -> None:
    given = Source(name=str(tmp_path / "none"), streaming=streaming)
    assert str(tmp_path / "none") in refusal(lambda: list(read(given)))


# state


def test_the_state_changes_when_a_file_does(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "a.jsonl", ROWS)
    before = state([source(tmp_path)])
    assert list(before) == [str(file)]
    assert state([source(tmp_path)]) == before

    os.utime(file, ns=(0, 1))
    touched = state([source(tmp_path)])
    assert touched != before

    stamp = file.stat()
    jsonl(file, ROWS[:2])
    os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    shorter = state([source(tmp_path)])
    assert shorter != touched

    jsonl(tmp_path / "b.jsonl", ROWS)
    assert len(state([source(tmp_path)])) == 2


def test_the_state_survives_a_manifest(tmp_path: Path) -> None:
    found = state([source(jsonl(tmp_path / "a.jsonl", ROWS))])
    assert json.loads(json.dumps(found)) == found


def test_other_endings_of_the_same_formats(tmp_path: Path) -> None:
    (tmp_path / "a.ndjson").write_text('{"text": "one"}\n')
    (tmp_path / "b.tsv").write_text("text\tlabel\ntwo, or so\tx\n")
    found = [row.payload for row in read(Source(path=str(tmp_path)))]
    assert found == [b'{"text": "one"}', {"text": "two, or so", "label": "x"}]
