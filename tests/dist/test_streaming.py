"""Streams on real ranks: the order of the data and the losses are those of one process, through a kill and a move."""

import http.server
import json
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from mistral_dist import retry
from tests.conftest import WriteRecipe
from tests.launch import kill, lines, losses, mistral_dist, status, train, training, wait_for, workers

STEPS = 16
BATCH = 4


def ragged(folder: Path, texts: list[dict[str, str]], shards: int) -> Path:
    """The texts in shards of very different sizes; one row in ten is no JSON."""
    folder.mkdir()
    rest = list(texts)
    for shard in range(shards):
        size = len(rest) if shard == shards - 1 else max(12, len(rest) * (shard % 3 + 1) // (2 * shards))
        mine, rest = rest[:size], rest[size:]
        rows = [("{" if n % 10 == 9 else "") + json.dumps(row) + "\n" for n, row in enumerate(mine)]
        (folder / f"{shard:02}.jsonl").write_text("".join(rows))
    return folder


def check_order(run: Path) -> None:
    """Every step once, each of four full slots, and as many different examples as there can be."""
    order = lines(run / "data_order.jsonl")
    assert [entry["step"] for entry in order] == list(range(1, STEPS + 1))
    assert all(len(entry["ids"]) >= BATCH for entry in order)
    assert [entry["step"] for entry in lines(run / "metrics.jsonl")] == list(range(1, STEPS + 1))
    assert len({id for entry in order for id in entry["ids"]}) > 100


def dropped(run: Path, exactly: bool) -> list[list[object]]:
    """(step, reason, place) of the quarantine; not exactly: the file, since a shard opened in its middle cannot tell the line."""
    entries = lines(run / "quarantine.jsonl")
    return [[entry["step"], entry["reason"], entry["place"] if exactly else entry["place"].split(".jsonl")[0]] for entry in entries]


@pytest.mark.parametrize("shards", [pytest.param(7, id="whole shards"), pytest.param(2, id="every fourth row", marks=pytest.mark.matrix)])
def test_a_stream_is_the_same_on_any_ranks_and_through_a_kill(
    shards: int, write_recipe: WriteRecipe, texts: list[dict[str, str]], tmp_path: Path
) -> None:
    folder = ragged(tmp_path / "stream", texts, shards)
    recipe = write_recipe(
        data={"sources": [{"path": str(folder)}], "streaming": True, "block": 16, "max_length": 192},
        train={"steps": STEPS, "global_batch_size": BATCH, "gradient_checkpointing": False},
    )
    alone = train(recipe, tmp_path / "alone", processes=1, zero=0)
    check_order(alone)
    bad = lines(alone / "quarantine.jsonl")
    assert len(bad) >= 8 and {entry["reason"] for entry in bad} == {"not_json"}
    assert max(Counter(entry["place"] for entry in bad).values()) == 1
    assert sum(entry["dropped"] for entry in lines(alone / "metrics.jsonl")) >= len(bad)
    runs = {f"ZeRO-2 x {ranks}": train(recipe, tmp_path / str(ranks), processes=ranks) for ranks in (2, 3)}

    moved = tmp_path / "moved"
    with training(recipe, moved, until=8, processes=3) as started:
        kill(started.pid)
        wait_for(lambda: not workers(moved))
    assert status(moved)["state"] == "running"
    saved = json.loads((moved / "checkpoints" / "checkpoint-5" / "progress.json").read_text())
    assert [lane["lane"] for lane in saved["cursor"]["lanes"]] == list(range(BATCH))
    runs["killed on 3 ranks, resumed on 2"] = train(recipe, moved, processes=2)
    assert "going on from checkpoint-5" in (moved / "log.txt").read_text()

    counts = ("step", "epoch", "trained_tokens", "tokens", "examples", "dropped")
    for name, run in runs.items():
        check_order(run)
        assert (run / "data_order.jsonl").read_bytes() == (alone / "data_order.jsonl").read_bytes(), name
        assert dropped(run, exactly=run != moved) == dropped(alone, exactly=run != moved), name
        for here, there in zip(lines(run / "metrics.jsonl"), lines(alone / "metrics.jsonl"), strict=True):
            assert {key: here[key] for key in counts} == {key: there[key] for key in counts}, name
        worst = max(abs(a - b) for a, b in zip(losses(run), losses(alone), strict=True))
        print(f"{shards} shards, {name}: float32 losses within {worst:.1e} of one process")
        assert worst <= 1e-4, name


def test_a_part_without_a_usable_row_ends_all_ranks_and_says_so(
    write_recipe: WriteRecipe, texts: list[dict[str, str]], tmp_path: Path
) -> None:
    folder = ragged(tmp_path / "stream", texts, BATCH)
    (folder / f"{BATCH - 1:02}.jsonl").write_text("nonsense\n" * 30)  # of the last slot, which rank 1 serves
    recipe = write_recipe(
        data={"sources": [{"path": str(folder)}], "streaming": True, "block": 16}, train={"steps": STEPS, "global_batch_size": BATCH}
    )
    run = tmp_path / "run"
    done = mistral_dist("train", recipe, f"run.dir={run}", "--processes", "2", "--zero", "2")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "part 4 of the 4 that the stream is dealt out in: none of its rows can be used" in done.stdout + done.stderr
    assert (status(run)["state"], status(run)["exit_code"]) == ("failed", 2)
    wait_for(lambda: not workers(run))


@pytest.mark.fault("a stream with too many rows that are no examples", "fails with the counts, exit code 2; each is named", zero=(2,))
def test_too_many_bad_rows_end_the_run_and_are_named(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    """One row in ten, where one in twenty is allowed: it is known after 1,000 rows, before there is a checkpoint."""
    folder = tmp_path / "stream"
    folder.mkdir()
    rows = [("{" if n % 10 == 9 else "") + json.dumps({"text": f"Entry {n}.", "label": "numpy"}) + "\n" for n in range(2000)]
    (folder / "rows.jsonl").write_text("".join(rows))
    recipe = write_recipe(
        data={"sources": [{"path": str(folder)}], "streaming": True, "block": 64, "max_length": 512, "bad_rows": 0.05},
        train={"steps": 500, "global_batch_size": BATCH, "gradient_checkpointing": False},
        checkpoint={"save_steps": 500},
    )
    run = tmp_path / "run"
    done = mistral_dist("train", recipe, f"run.dir={run}", "--processes", "2")
    assert done.returncode == 2, done.stdout + done.stderr
    told = status(run)["message"]
    counts = re.search(r"data\.bad_rows=0\.05: (\d+) of the stream's first ([\d,]+) rows are no examples", told)
    assert counts is not None, told
    entries = lines(run / "quarantine.jsonl")
    assert {entry["reason"] for entry in entries} == {"not_json"}
    # of a block that was begun all are there
    assert len({entry["place"] for entry in entries}) == len(entries) >= int(counts[1]) > 50
    assert not list((run / "checkpoints").glob("checkpoint-*"))


class Stalling(http.server.BaseHTTPRequestHandler):
    """Gives its file up to a place, and then nothing more for as long as anybody waits."""

    content, until = b"", 0

    def do_GET(self) -> None:
        begin = int(re.findall(r"bytes=(\d+)", self.headers.get("Range", "bytes=0-"))[0])
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {begin}-{len(self.content) - 1}/{len(self.content)}")
        self.send_header("Content-Length", str(len(self.content) - begin))
        self.send_header("ETag", '"one"')
        self.end_headers()
        self.wfile.write(self.content[begin : self.until])
        time.sleep(600)

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture
def stalling(texts: list[dict[str, str]]) -> Iterator[str]:
    """The address of the texts, of which the last third never comes."""
    Stalling.content = "".join(json.dumps(row) + "\n" for row in texts).encode()
    Stalling.until = len(Stalling.content) * 2 // 3
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Stalling)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/texts.jsonl"
    server.shutdown()


@pytest.mark.matrix
@pytest.mark.fault("a stop signal while a stream's server gives nothing", "saved and stopped at once, exit code 85", zero=(2,))
def test_a_stop_does_not_wait_for_data(stalling: str, write_recipe: WriteRecipe, tmp_path: Path) -> None:
    """A rank that waits for its data bears 240 seconds of silence before it is an error: longer than a scheduler would wait."""
    recipe = write_recipe(
        data={"sources": [{"path": stalling}], "streaming": True, "block": 16, "max_length": 192},
        train={"steps": 500, "global_batch_size": BATCH, "gradient_checkpointing": False},
    )
    run = tmp_path / "run"
    with training(recipe, run, until=3) as started:
        made = -1
        while made != (made := len(losses(run))):  # until it gets no further
            time.sleep(6)
        began = time.monotonic()
        started.send_signal(signal.SIGTERM)
        assert started.wait(120) == 85, (run / "log.txt").read_text()
        seconds = time.monotonic() - began
    found = status(run)
    assert (found["state"], found["step"], found["checkpoint"]) == ("stopped", made, f"checkpoint-{made}")
    assert found["message"].startswith("stopped on request (SIGTERM)")
    print(f"stopped after {seconds:.0f} s, at step {made}")
    assert seconds < retry.SECONDS / 2
