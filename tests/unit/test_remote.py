"""Real requests to a real server on this machine that does what servers do: it resets, stalls, cuts, refuses and changes."""

import gzip
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pyarrow
import pyarrow.parquet
import pytest

from mistral_dist import retry
from mistral_dist.config import Source
from mistral_dist.data import hub_sets, places, remote
from mistral_dist.data.cursor import Cursor
from mistral_dist.data.encode import Encoded
from mistral_dist.data.example import Row
from mistral_dist.data.lanes import Lanes, Read, Rules, Streamed
from mistral_dist.data.sources import check, read, shards, state
from mistral_dist.errors import DataError

ROWS = [{"text": f"row {n} " + "x" * (n * 37 % 300)} for n in range(400)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
BOUND = 8.0
"""No test of a fault may last longer: patience is 3 s here, and an attempt 0.8 s."""


class Server(ThreadingHTTPServer):
    """Serves `files`; what is in `script` happens to the next requests, `always` to all. The first look is not scripted."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.script: list[str] = []
        self.always = ""
        self.parts = True
        self.stamp = 'ETag: "one"'
        self.asked: list[tuple[str, str]] = []
        self.times: list[float] = []
        self.sent = 0

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{name}"

    def handle_error(self, *_: object) -> None:
        """The client may go when it likes."""


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server, part = self.server, self.headers.get("Range", "")
        name = self.path.lstrip("/").partition("?")[0]
        server.asked.append((name, part))
        server.times.append(time.monotonic())
        action = server.always
        if not action and part != "bytes=0-0" and server.script:
            action = server.script.pop(0)
        verb, _, what = action.partition(":")
        if verb == "status":
            code, _, wait = what.partition(":")
            return self.refuse(int(code), wait)
        if verb == "stall":
            time.sleep(2.5)
        if verb == "change":
            server.files[name] = what.encode() if what else server.files[name].swapcase()
            server.stamp = server.stamp.replace("one", "two")
        if name not in server.files:
            return self.refuse(404)
        self.answer(server.files[name], part, verb, int(what) if verb in ("reset", "cut", "pause") else None)

    def refuse(self, code: int, wait: str = "") -> None:
        self.send_response(code)
        if wait:
            self.send_header("Retry-After", wait)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def answer(self, data: bytes, part: str, verb: str, only: int | None) -> None:
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", part) if self.server.parts else None
        start, total = int(found[1]) if found else 0, len(data)
        if found and start >= total:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{total}")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        end = min(int(found[2]) + 1, total) if found and found[2] else total
        self.send_response(206 if found else 200)
        if found:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{total}")
        if self.server.stamp:
            key, _, value = self.server.stamp.partition(": ")
            self.send_header(key, value)
        self.send_header("Content-Length", str(end - start))
        self.end_headers()
        body = data[start:end]
        self.wfile.write(body[:only])
        self.server.sent += len(body[:only])
        if verb == "pause":
            time.sleep(2.5)
            self.wfile.write(body[only:])
        if verb == "reset":  # no orderly end: what the kernel sends is RST
            self.wfile.flush()
            time.sleep(0.1)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(places, "CONNECT_SECONDS", 0.3)
    monkeypatch.setattr(places, "STALL_SECONDS", 0.5)
    monkeypatch.setattr(places, "BLOCK", 4096)
    monkeypatch.setattr(retry, "SECONDS", 3.0)
    monkeypatch.setattr(retry, "FIRST_WAIT", 0.02)
    monkeypatch.setattr(retry, "LONGEST_WAIT", 0.3)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    served = Server()
    thread = threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    served.files["f.jsonl"] = LINES
    yield served
    served.shutdown()
    served.server_close()


def values(row: Row) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(row.payload) if isinstance(row.payload, bytes) else row.payload
    return found


def rows(url: str) -> list[dict[str, Any]]:
    return [values(row) for row in read(Source(path=url))]


def refusal(action: Callable[[], object]) -> str:
    begun = time.monotonic()
    with pytest.raises(DataError) as caught:
        action()
    assert time.monotonic() - begun < BOUND
    assert "\n" not in str(caught.value)
    return str(caught.value)


# what is read


def test_rows_come_in_order_with_their_places(server: Server) -> None:
    url = server.url("f.jsonl")
    assert [(row.place, values(row)) for row in read(Source(path=url))] == [(f"{url}:{n}", row) for n, row in enumerate(ROWS, 1)]
    assert server.asked == [("f.jsonl", "bytes=0-0"), ("f.jsonl", "bytes=0-")]


@pytest.mark.parametrize("parts", [True, False])
def test_every_format_is_read_from_the_web(server: Server, tmp_path: Path, parts: bool) -> None:
    server.parts = parts
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "f.parquet", row_group_size=50)
    server.files |= {
        "f.jsonl.gz": gzip.compress(LINES),
        "f.json": json.dumps(ROWS).encode(),
        "f.csv": ("text\n" + "".join(f"{row['text']}\n" for row in ROWS)).encode(),
        "f.txt": "".join(f"{row['text']}\n" for row in ROWS).encode(),
        "f.parquet": (tmp_path / "f.parquet").read_bytes(),
    }
    for name in server.files:
        assert rows(server.url(name)) == ROWS, name
        (shard,) = shards(Source(path=server.url(name)))
        whole = list(shard.rows())
        again = [(position, row.payload) for position, row in shard.rows(whole[299][0])]
        assert again == [(position, row.payload) for position, row in whole[300:]], name


def test_a_seek_asks_for_no_more_than_the_rest(server: Server, tmp_path: Path) -> None:
    (shard,) = shards(Source(path=server.url("f.jsonl")))
    positions = [position for position, _ in shard.rows()]
    server.asked.clear()
    assert len(list(shard.rows(positions[-2]))) == 1
    assert server.asked == [("f.jsonl", "bytes=0-0"), ("f.jsonl", f"bytes={positions[-2]}-")]


def test_of_parquet_only_the_wanted_row_groups_are_asked_for(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = [str(hash(("x", n))) * 50 for n in range(2000)]
    pyarrow.parquet.write_table(pyarrow.table({"text": noise}), tmp_path / "f.parquet", row_group_size=200, compression="none")
    server.files["f.parquet"] = (tmp_path / "f.parquet").read_bytes()
    (shard,) = shards(Source(path=server.url("f.parquet")))
    assert [values(row)["text"] for _, row in shard.rows(1900)] == noise[1900:]
    starts = {int(part.removeprefix("bytes=").partition("-")[0]) for _, part in server.asked} - {0}
    assert min(starts) > len(server.files["f.parquet"]) * 0.8


def test_an_empty_file_is_refused_by_name(server: Server) -> None:
    server.files["f.jsonl"] = b""
    line = refusal(lambda: rows(server.url("f.jsonl")))
    assert server.url("f.jsonl") in line and "empty" in line


def test_the_format_is_told_from_the_path_and_checked_without_a_network() -> None:
    check((Source(path="https://nowhere.invalid/a.jsonl.gz?x=1"),))
    assert "unknown format '.pdf'" in refusal(lambda: check((Source(path="https://nowhere.invalid/a.pdf"),)))


def test_a_signature_in_a_url_is_sent_and_never_shown(server: Server) -> None:
    ((place, _), *_) = [(row.place, row) for row in read(Source(path=server.url("f.jsonl?X-Amz-Signature=secret")))]
    assert place == server.url("f.jsonl:1")
    server.always = "status:403"
    assert "secret" not in refusal(lambda: rows(server.url("f.jsonl?X-Amz-Signature=secret")))
    assert "secret" not in json.dumps(remote.shown("https://me:secret@host/a.jsonl?k=secret"))


# faults that heal


@pytest.mark.parametrize(
    "script",
    [
        ["reset:10000"],
        ["reset:0", "reset:100", "reset:30000"],
        ["cut:5000", "cut:1"],
        ["status:500", "status:500"],
        ["status:503", "reset:20000", "status:502"],
        ["stall"],
        ["pause:9000"],
    ],
    ids=lambda script: "+".join(script),
)
@pytest.mark.parametrize("parts", [True, False])
def test_after_a_fault_the_rows_are_complete_and_in_order(server: Server, script: list[str], parts: bool) -> None:
    server.parts = parts
    server.script = list(script)
    begun = time.monotonic()
    assert rows(server.url("f.jsonl")) == ROWS
    assert server.script == []  # all of it has happened
    assert time.monotonic() - begun < BOUND


def test_reading_goes_on_at_the_byte_that_was_reached(server: Server) -> None:
    server.script = ["cut:10000"]
    assert rows(server.url("f.jsonl")) == ROWS
    assert server.asked[-1] == ("f.jsonl", "bytes=10000-")
    assert server.sent == 1 + len(LINES)


def test_a_server_that_asks_to_wait_is_obeyed(server: Server) -> None:
    server.script = ["status:429:1"]
    assert rows(server.url("f.jsonl")) == ROWS
    assert server.times[-1] - server.times[-2] >= 1.0


def test_trouble_again_and_again_is_borne_while_reading_gets_on(server: Server) -> None:
    server.script = ["cut:1500"] * 30
    assert rows(server.url("f.jsonl")) == ROWS
    assert server.script == []


# faults that do not


@pytest.mark.parametrize("code", [401, 403, 404, 410])
@pytest.mark.parametrize("at", ["look", "read"])
def test_what_waiting_does_not_heal_is_refused_at_once(server: Server, code: int, at: str) -> None:
    server.always = f"status:{code}" if at == "look" else ""
    server.script = [f"status:{code}"]
    line = refusal(lambda: rows(server.url("f.jsonl")))
    for word in [server.url("f.jsonl"), f"HTTP {code}", "check the address"]:
        assert word in line
    assert len(server.asked) == (1 if at == "look" else 2)


@pytest.mark.parametrize(
    ("always", "words"),
    [
        ("status:500", ["HTTP 500 Internal Server Error", "attempts in"]),
        ("status:429:3600", ["HTTP 429", "asks to wait 3600 s"]),
        ("stall", ["no answer", "attempts in"]),
        ("reset:0", ["reset", "attempts in"]),
    ],
)
def test_what_does_not_heal_in_time_is_refused_with_its_reason(server: Server, always: str, words: list[str]) -> None:
    server.always = always
    line = refusal(lambda: rows(server.url("f.jsonl")))
    for word in [server.url("f.jsonl"), *words, "try again"]:
        assert word in line.replace("timed out", "no answer")


def test_a_fault_in_the_middle_names_the_byte(server: Server) -> None:
    server.script = ["cut:10000", *["status:500"] * 100]
    line = refusal(lambda: rows(server.url("f.jsonl")))
    for word in [server.url("f.jsonl"), f"byte 10000 of {len(LINES)}", "HTTP 500"]:
        assert word in line


@pytest.mark.parametrize("parts", [True, False])
def test_a_file_shorter_than_announced_is_refused(server: Server, parts: bool) -> None:
    server.parts = parts
    server.script = ["cut:10000"] + ["cut:0" if parts else "cut:10000"] * 100
    line = refusal(lambda: rows(server.url("f.jsonl")))
    for word in [server.url("f.jsonl"), f"after 10000 of {len(LINES)} bytes"]:
        assert word in line


@pytest.mark.parametrize("stamp", ['ETag: "one"', "Last-Modified: one"])
@pytest.mark.parametrize("change", ["change", "change:shorter"])
def test_a_file_that_changes_while_it_is_read_is_refused(server: Server, stamp: str, change: str) -> None:
    server.stamp = stamp
    server.script = ["cut:10000", change]
    line = refusal(lambda: rows(server.url("f.jsonl")))
    for word in [server.url("f.jsonl"), "changed while it was read", "start again"]:
        assert word in line


def test_nobody_there_is_refused_with_the_url(server: Server) -> None:
    with socket.socket() as taken:  # bound, but not listening
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/f.jsonl"
        line = refusal(lambda: rows(url))
    assert url in line and "refused" in line


def test_a_damaged_file_on_the_web_is_named(server: Server) -> None:
    server.files["f.jsonl.gz"] = gzip.compress(LINES)[:-20]
    line = refusal(lambda: rows(server.url("f.jsonl.gz")))
    assert server.url("f.jsonl.gz:") in line and "after" in line


def test_a_fault_while_parquet_is_read_keeps_its_reason(server: Server, tmp_path: Path) -> None:
    noise = [str(hash(("x", n))) * 50 for n in range(2000)]
    pyarrow.parquet.write_table(pyarrow.table({"text": noise}), tmp_path / "f.parquet", row_group_size=200, compression="none")
    server.files["f.parquet"] = (tmp_path / "f.parquet").read_bytes()
    server.script = ["ok", "cut:20000", *["status:500"] * 100]  # the footer; some rows
    line = refusal(lambda: rows(server.url("f.parquet")))
    assert server.url("f.parquet") in line and "HTTP 500" in line


# state


def test_the_state_of_a_file_on_the_web_changes_with_its_stamp(server: Server) -> None:
    given = (Source(path=server.url("f.jsonl")),)
    before = state(given)
    assert before == {server.url("f.jsonl"): [len(LINES), '"one"']}
    assert state(given) == before
    server.stamp = 'ETag: "two"'
    assert state(given) != before
    server.stamp = ""
    assert state(given) == {server.url("f.jsonl"): [len(LINES)]}


# other filesystems


@pytest.fixture
def memory() -> Iterator[Any]:
    fs = fsspec.filesystem("memory")
    yield fs
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]


@pytest.mark.parametrize("given", ["memory://in", "memory://in/**/*.jsonl*", "memory://in/"])
def test_a_folder_or_pattern_elsewhere_stands_for_its_files(server: Server, memory: Any, given: str) -> None:
    halves = LINES[: LINES.index(b"\n", 20000) + 1], LINES[LINES.index(b"\n", 20000) + 1 :]
    for name, data in {"a/1.jsonl": halves[0], "b.jsonl.gz": gzip.compress(halves[1]), ".x/c.jsonl": LINES, "notes.pdf": b""}.items():
        memory.pipe_file(f"/in/{name}", data)
    for name in ("manifest.json", "quarantine.jsonl", "train/d.jsonl"):
        memory.pipe_file(f"/in/prepared/{name}", b"{}\n")
    assert rows(given) == ROWS
    assert [shard.name for shard in shards(Source(path=given))] == ["memory:///in/a/1.jsonl", "memory:///in/b.jsonl.gz"]
    assert len(state((Source(path=given),))) == 2


class Faulty:
    """Replaces a method of a filesystem: what is in `script` happens to the next calls."""

    def __init__(self, fs: Any, name: str, script: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
        self.script, self.real = script, getattr(fs, name)
        monkeypatch.setattr(type(fs), name, lambda _self, *words, **options: self(*words, **options))

    def __call__(self, *words: Any, **options: Any) -> Any:
        what = self.script.pop(0) if self.script else None
        if isinstance(what, Exception):
            raise what
        if callable(what):
            return what(self.real, *words, **options)
        return self.real(*words, **options)


def hang(*_: object, **__: object) -> bytes:
    time.sleep(5)
    return b""


@pytest.mark.parametrize(
    "script",
    [
        [None, ConnectionResetError("reset"), TimeoutError("timed out")],
        [hang],
        [None, lambda real, path, start, end: real(path, start=start, end=end)[:-1]],
    ],
    ids=["errors", "hang", "short"],
)
def test_a_filesystem_that_fails_hangs_or_brings_too_little_is_asked_again(
    server: Server, memory: Any, monkeypatch: pytest.MonkeyPatch, script: list[Any]
) -> None:
    memory.pipe_file("/f.jsonl", LINES)
    faulty = Faulty(memory, "cat_file", list(script), monkeypatch)
    begun = time.monotonic()
    assert rows("memory://f.jsonl") == ROWS
    assert faulty.script == []
    assert time.monotonic() - begun < BOUND


def test_a_filesystem_that_always_hangs_is_refused_in_time(server: Server, memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    memory.pipe_file("/f.jsonl", LINES)
    Faulty(memory, "cat_file", [hang] * 100, monkeypatch)
    line = refusal(lambda: rows("memory://f.jsonl"))
    assert "memory://f.jsonl" in line and "no answer" in line


@pytest.mark.parametrize("error", [PermissionError("Forbidden"), FileNotFoundError("f.jsonl")])
def test_a_filesystem_that_refuses_is_not_asked_again(
    server: Server, memory: Any, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    memory.pipe_file("/f.jsonl", LINES)
    faulty = Faulty(memory, "cat_file", [error, RuntimeError("asked again")], monkeypatch)
    assert "memory://f.jsonl" in refusal(lambda: rows("memory://f.jsonl"))
    assert len(faulty.script) == 1


def test_a_file_elsewhere_that_changes_while_it_is_read_is_refused(server: Server, memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    memory.pipe_file("/f.jsonl", LINES)

    def change(real: Any, path: str, start: int, end: int) -> bytes:
        memory.pipe_file("/f.jsonl", LINES[:-5])
        return real(path, start=start, end=end)  # type: ignore[no-any-return]

    Faulty(memory, "cat_file", [None, change], monkeypatch)
    line = refusal(lambda: rows("memory://f.jsonl"))
    assert "memory://f.jsonl" in line and "changed while it was read" in line


def test_what_is_not_there_is_refused_by_name(server: Server, memory: Any) -> None:
    for path in ("memory://no.jsonl", "memory://no/*.jsonl"):
        assert path in refusal(lambda path=path: rows(path))  # type: ignore[misc]


def test_a_filesystem_that_is_not_installed_is_named(server: Server) -> None:
    line = refusal(lambda: rows("nosuch://bucket/f.jsonl"))
    assert "nosuch://bucket/f.jsonl" in line


# streams of hub data sets


def stream(faults: list[Any]) -> Callable[[], Iterator[dict[str, Any]]]:
    """Begins a stream anew each time; each beginning takes the next fault: (after how many rows, what happens)."""

    def begin() -> Iterator[dict[str, Any]]:
        after, what = faults.pop(0) if faults else (len(ROWS), None)
        yield from ROWS[:after]
        if isinstance(what, Exception):
            raise what
        if what == "hang":
            time.sleep(5)

    return begin


@pytest.mark.parametrize("start", [0, 150])
@pytest.mark.parametrize(
    "faults",
    [
        [(0, ConnectionResetError("reset")), (17, TimeoutError("timed out")), (300, ConnectionError("gone"))],
        [(200, "hang")],
    ],
    ids=["errors", "hang"],
)
def test_a_stream_goes_on_after_the_last_row(server: Server, monkeypatch: pytest.MonkeyPatch, faults: list[Any], start: int) -> None:
    monkeypatch.setattr(hub_sets, "STALL_SECONDS", 0.8)
    left = list(faults)
    found = list(hub_sets.resumed(stream(left), "org/rows[train]", start))
    assert found == list(enumerate(ROWS, 1))[start:]
    assert left == []


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ((100, ConnectionResetError("reset by peer")), ["after row 100", "reset by peer", "attempts in"]),
        ((100, "hang"), ["after row 100", "no row in", "attempts in"]),
        ((100, KeyError("text")), ["after row 100", "text", "not tried again"]),
    ],
)
def test_a_stream_that_does_not_heal_is_refused_with_the_row(
    server: Server, monkeypatch: pytest.MonkeyPatch, fault: Any, words: list[str]
) -> None:
    monkeypatch.setattr(hub_sets, "STALL_SECONDS", 0.8)
    line = refusal(lambda: list(hub_sets.resumed(stream([fault] * 100), "org/rows[train]", 0)))
    for word in ["org/rows[train]", *words]:
        assert word in line


def test_a_stream_that_nobody_reads_any_more_stops(server: Server) -> None:
    before = threading.active_count()
    rows = hub_sets.resumed(lambda: iter(lambda: {"text": "for ever"}, None), "endless", 0)
    assert next(rows) == (1, {"text": "for ever"})
    assert threading.active_count() == before + 1
    rows.close()  # type: ignore[attr-defined]
    until = time.monotonic() + BOUND
    while threading.active_count() > before and time.monotonic() < until:
        time.sleep(0.05)
    assert threading.active_count() == before


# streams for training


class Words:
    """Reads a row as an example of as many tokens as it has words."""

    def block(self, rows: Any) -> Read:
        texts = [json.loads(row.payload)["text"] for _, row in rows]
        return Read([(text[:8], Encoded([1] * (2 + len(text) // 20), [1])) for text in texts])


def stream_order(source: Source) -> list[tuple[Any, ...]]:
    """The ids of 30 steps of 3 lanes."""
    streamed = Streamed(0, "rows", shards(source))
    lanes = Lanes([streamed], Words(), Rules(lanes=3, block=50, capacity=64, seed=1, bad_rows=0.1), steps=30)
    return [tuple(entry for batch in work.batches for entry in batch.ids) for work in lanes.from_cursor(Cursor())]


@pytest.mark.parametrize(
    "script", [["reset:9000"], ["status:500", "status:500"], ["status:429:0"], ["stall"], ["cut:5000", "cut:7000"], []]
)
@pytest.mark.parametrize("parts", [True, False])
def test_a_stream_trains_in_the_same_order_whatever_the_server_does(server: Server, tmp_path: Path, script: list[str], parts: bool) -> None:
    (tmp_path / "rows.jsonl").write_bytes(LINES)
    server.files["rows.jsonl"], server.script, server.parts = LINES, script, parts
    assert stream_order(Source(path=server.url("rows.jsonl"))) == stream_order(Source(path=str(tmp_path / "rows.jsonl")))


@pytest.mark.parametrize(("always", "words"), [("status:500", "500"), ("stall", ""), ("status:404", "404"), ("reset:0", "")])
def test_a_stream_whose_server_never_recovers_ends_with_its_url(server: Server, always: str, words: str) -> None:
    server.files["rows.jsonl"], server.always = LINES, always
    started = time.monotonic()
    with pytest.raises(DataError, match=re.escape(server.url("rows.jsonl"))) as caught:
        stream_order(Source(path=server.url("rows.jsonl")))
    assert words in str(caught.value)
    assert time.monotonic() - started < BOUND


def test_a_server_that_is_not_there_is_not_waited_for_as_long_as_one_that_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "SECONDS", 60.0)
    monkeypatch.setattr(remote, "UNREACHED_SECONDS", 1.0)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/rows.jsonl"
        started = time.monotonic()
        line = refusal(lambda: rows(url))
    assert "refused" in line
    assert url in line
    assert time.monotonic() - started < 5
