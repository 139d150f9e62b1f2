"""Agreeing to stop, looking after each other, differing, running out of memory: the parts, in real groups where ranks matter."""

import datetime
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from mistral_dist.config import Recipe
from mistral_dist.errors import StopAgreed
from mistral_dist.runtime import process
from mistral_dist.runtime.causes import cause
from mistral_dist.runtime.control import Control, Deadline
from mistral_dist.runtime.drift import code_fingerprint, drift, recipe_facts
from mistral_dist.runtime.engine import Runtime
from mistral_dist.runtime.memory import Scene, explanation, is_out_of_memory
from mistral_dist.runtime.process import StopRequest
from mistral_dist.runtime.watch import VALIDATION, Beat, Place, Seen, Watch, hung, sentence, slow
from tests.launch import ROOT


def recipe(**train: object) -> Recipe:
    return Recipe.model_validate(
        {"version": 1, "task": {"kind": "chat"}, "data": {"sources": [{"path": "x.jsonl"}]}, "model": {"name": "org/model"}, "train": train}
    )


def group(tmp_path: Path, code: str, ranks: int = 2) -> list[str]:
    """Run code on a real gloo group of processes; the last line that each prints."""
    script = tmp_path / "rank.py"
    script.write_text(JOIN + code + LEAVE)
    environment = {**os.environ, "WORLD_SIZE": str(ranks), "STORE": str(tmp_path / "store"), "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen([sys.executable, str(script)], env={**environment, "RANK": str(rank)}, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for rank in range(ranks)
    ]
    try:
        said = [process.communicate(timeout=120)[0] for process in started]
        assert [process.returncode for process in started] == [0] * ranks, said
        return [words.splitlines()[-1] for words in said]
    finally:
        for process in started:
            process.kill()


JOIN = """
import datetime, os, signal, sys, time
sys.path.insert(0, os.getcwd())
import torch
rank = int(os.environ["RANK"])
torch.distributed.init_process_group("gloo", f"file://{os.environ['STORE']}", rank=rank, world_size=int(os.environ["WORLD_SIZE"]))
from mistral_dist.errors import StopAgreed
from mistral_dist.runtime.control import Control, Deadline
from mistral_dist.runtime.process import StopRequest
stop = StopRequest()
stop.__enter__()
"""
LEAVE = """
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


def test_each_machine_looks_for_itself_once_and_an_error_is_everybodys(tmp_path: Path) -> None:
    """Ranks 0 and 1 on one machine, 2 on another."""
    code = """
from mistral_dist.errors import ModelError
from mistral_dist.runtime.engine import Runtime
os.environ.update(GROUP_RANK="01"[rank == 2], LOCAL_RANK="010"[rank])
runtime = Runtime.__new__(Runtime)  # what it takes to gather, and no accelerator
runtime.rank, runtime.world_size = rank, 3
looked = []
def look(fails):
    looked.append(rank)
    if fails:
        raise ModelError(f"rank {rank} cannot")
    return f"seen by {rank}"
said = [runtime.on_each_machine(lambda: look(False))]
try:
    runtime.on_each_machine(lambda: look(rank == 2))
except ModelError as error:
    said.append(str(error))
print(*said, len(looked))
"""
    assert group(tmp_path, code, ranks=3) == ["seen by 0 rank 2 cannot 2", "seen by 0 rank 2 cannot 0", "seen by 2 rank 2 cannot 2"]


# stopping


def test_all_ranks_stop_at_the_same_micro_step_after_the_one_in_which_one_was_asked(tmp_path: Path) -> None:
    code = """
control = Control(3, stop, Deadline(0.0, None), datetime.timedelta(seconds=60))
try:
    for micro in range(1, 10):
        control.check()
        if (rank, micro) == (2, 4):
            os.kill(os.getpid(), signal.SIGUSR1)
            os.kill(os.getpid(), signal.SIGTERM)
    print("never")
except StopAgreed as asked:
    print(micro, asked)
"""
    # asked in the fourth, said at the beginning of the fifth, known when that is done
    assert group(tmp_path, code, ranks=3) == ["6 on request (SIGUSR1)"] * 3


def test_between_stages_all_ranks_know_at_once(tmp_path: Path) -> None:
    code = """
control = Control(2, stop, Deadline(0.0, None), datetime.timedelta(seconds=60))
control.agree()
control.check()
if rank == 1:
    os.kill(os.getpid(), signal.SIGINT)
try:
    control.agree()
    print("never")
except StopAgreed as asked:
    print(asked)
"""
    assert group(tmp_path, code) == ["on request (SIGINT)"] * 2


def test_a_signal_after_the_last_agreement_lets_the_run_finish_on_all_ranks(tmp_path: Path) -> None:
    code = """
control = Control(2, stop, Deadline(0.0, None), datetime.timedelta(seconds=60))
for micro in range(3):
    control.check()
os.kill(os.getpid(), signal.SIGTERM)
control.finish()
print("finished")
"""
    assert group(tmp_path, code) == ["finished"] * 2


def test_the_time_of_one_rank_is_the_time_of_all(tmp_path: Path) -> None:
    code = """
control = Control(2, stop, Deadline(time.monotonic(), 1.0 if rank == 1 else None), datetime.timedelta(seconds=60))
try:
    while True:
        control.check()
        time.sleep(0.05)
except StopAgreed as asked:
    print(asked)
"""
    assert group(tmp_path, code) == ["by train.max_seconds"] * 2


def test_a_deadline_leaves_time_for_a_save_and_two_micro_steps() -> None:
    now = [100.0]
    deadline = Deadline(100.0, 60.0, clock=lambda: now[0])
    assert not deadline.is_over(None)
    now[0] = 153.9
    assert not deadline.is_over(None), "a tenth of a minute is kept for a save that was not measured"
    assert deadline.is_over(6.2)
    assert deadline.is_over(None, saves=2), "one that is on its way, and the last"
    assert deadline.is_over(3.1, saves=2) and not deadline.is_over(3.0, saves=2)
    now[0] = 154.0
    assert deadline.is_over(None)
    assert not deadline.is_over(5.9)
    deadline.lap()
    now[0] = 155.0
    deadline.lap()
    assert deadline.is_over(3.1), "a micro-step takes 1 s: two of them and the save no longer fit"
    assert not deadline.is_over(2.9)
    deadline.rest()
    now[0] = 156.0
    deadline.lap()
    assert not deadline.is_over(1.9), "loading is no micro-step"


@pytest.mark.parametrize("ask", ["agree_to_go_on", "check_stop"])
def test_a_save_that_is_on_its_way_is_waited_for_too(ask: str) -> None:
    """After 52 of 60 seconds, with saves of 5 seconds."""
    runtime = Runtime.__new__(Runtime)  # alone, and without an accelerator
    deadline = Deadline(0.0, 60.0, clock=lambda: 52.0)
    runtime._control, runtime._save_seconds = Control(1, StopRequest(), deadline, datetime.timedelta(seconds=1)), 5.0
    runtime.is_writing = lambda: False
    getattr(runtime, ask)()
    runtime.is_writing = lambda: True
    with pytest.raises(StopAgreed, match=r"train\.max_seconds"):
        getattr(runtime, ask)()


def test_without_a_limit_there_is_no_deadline() -> None:
    assert not Deadline(0.0, None).is_over(1e9)


def test_a_launch_begins_when_the_launcher_says_or_when_this_process_started(monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    own = process.launched()
    assert own < time.monotonic()
    monkeypatch.setenv(process.LAUNCHER, process.identity())
    monkeypatch.setenv(process.STARTED, str(own - 60))
    assert process.launched() == own - 60
    monkeypatch.setenv(process.STARTED, str(time.monotonic() + 3600))
    assert abs(process.launched() - own) < 1, "the clock of another machine says nothing"


# hung and slow ranks


def ranks(*states: tuple[int, str, float, float]) -> dict[int, Seen]:
    """(moves, phase, seconds since it was alive, seconds since it moved) of each rank."""
    found = {}
    for rank, (moves, phase, alive, moved) in enumerate(states):
        beat = Beat(f"node{rank // 2}", f"{100 + rank}:5:aa", 7, Place(moves, phase, 12, 3), None)
        found[rank] = Seen(beat, 1000.0 - alive, 1000.0 - moved)
    return found


def test_the_one_that_the_others_wait_for_is_named() -> None:
    found = ranks((9, "backward", 1, 400), (8, "forward", 1, 301), (9, "backward", 1, 301), (9, "backward", 1, 301))
    verdict = hung(found, 1000.0, 300.0)
    assert list(verdict) == [1]
    assert sentence(verdict, found) == (
        "rank 1 (process 101 on node0) has not moved for 301 s: step 12, micro-step 3, forward; ranks 0, 2, 3 waited for it"
    )


def test_the_one_that_gives_no_sign_of_life_is_named_wherever_it_stands() -> None:
    found = ranks((9, "backward", 1, 300), (9, "backward", 302, 310))
    verdict = hung(found, 1000.0, 300.0)
    assert sentence(verdict, found) == (
        "rank 1 (process 101 on node0) has given no sign of life for 302 s; last seen at step 12, micro-step 3, backward;"
        " rank 0 waited for it"
    )


@pytest.mark.parametrize(
    "states",
    [
        [(9, "forward", 1, 299), (8, "forward", 1, 299)],  # not long enough
        [(9, "forward", 1, 900), (9, "forward", 1, 900)],  # all at the same place: slow, not hung
        [(9, "saving", 1, 1100), (8, "saving", 1, 1100)],  # one writes, the others wait
        [(2, "loading", 1, 1100), (1, "loading", 1100, 1100)],
        [(9, "forward", 1, 900)],
    ],
)
def test_nobody_is_named_without_reason(states: Sequence[tuple[int, str, float, float]]) -> None:
    assert hung(ranks(*states), 1000.0, 300.0) == {}


@pytest.mark.parametrize("phase", ["saving", "loading"])
def test_loading_and_saving_have_four_times_as_long(phase: str) -> None:
    assert list(hung(ranks((9, "forward", 1, 9), (8, phase, 1, 1200)), 1000.0, 300.0)) == [1]


def test_seen_is_by_this_ranks_own_clock() -> None:
    first = Beat("h", "1:1:a", 1, Place(5, "forward", 1, 1))
    seen = Seen(first, 10.0, 10.0)
    seen.update(Beat("h", "1:1:a", 2, Place(5, "forward", 1, 1)), 20.0)
    assert (seen.alive, seen.moved) == (20.0, 10.0)
    seen.update(Beat("h", "1:1:a", 2, Place(6, "backward", 1, 1)), 30.0)
    assert (seen.alive, seen.moved) == (20.0, 30.0)


def test_a_beat_is_read_as_it_was_written() -> None:
    beat = Beat("h", "1:1:a", 3, Place(4, "update", 2, None), 0.25)
    assert Beat.read(beat.write()) == beat
    assert str(beat.place) == "step 2, update"


def test_a_slow_rank_is_measured_against_the_others() -> None:
    assert slow({0: 1.0, 1: 1.1, 2: 0.9, 3: 2.1}) == (3, 2.1)
    assert slow({0: 1.0, 1: 1.49}) is None
    assert slow({0: 3.0, 1: 1.5}) == (0, 2.0)
    assert slow({0: 3.0}) is None
    assert slow({}) is None


def test_a_rank_that_is_deep_in_a_library_is_named_by_the_others_and_killed(tmp_path: Path) -> None:
    """Rank 1 sleeps in C without a move while rank 0 is ahead; the watch ends both, and rank 0 has reported."""
    code = """
import pathlib
from mistral_dist.runtime.watch import Place, Watch
store = torch.distributed.distributed_c10d._get_default_store()
folder = pathlib.Path(os.environ["STORE"]).parent
moves = [0]
def report(message):
    (folder / f"reported-by-{rank}").write_text(message)
Watch(rank, 2, torch.distributed.PrefixStore("watch", store), 2.0, place=lambda: Place(moves[0], "forward", 1, moves[0]),
      pace=lambda: None, stacks=folder / "stacks", report=report, say=print)
for moves[0] in range(1, 6 if rank == 0 else 3):
    time.sleep(0.5)
def in_a_library():
    time.sleep(60)
in_a_library()
"""
    with pytest.raises(AssertionError):
        group(tmp_path, code)
    assert not (tmp_path / "reported-by-1").exists()
    assert "rank 1 (process" in (tmp_path / "reported-by-0").read_text()
    for rank in (0, 1):
        assert "in_a_library" in (tmp_path / "stacks" / f"rank-{rank}.txt").read_text()


SERVER = """
import time, torch
store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
print(store.port, flush=True)
time.sleep(600)
"""
WATCHED = """
import os, pathlib, sys, time
import torch
from mistral_dist.runtime.watch import Place, Watch, board
folder, phase = pathlib.Path(sys.argv[1]), sys.argv[2]
watch = Watch(0, 1, board(), 2.0, place=lambda: Place(7, phase, 3, 1), pace=lambda: None, stacks=folder / "stacks",
              report=(folder / "reported").write_text, say=lambda line: print(line, flush=True))
print("watched", flush=True)
sys.stdin.readline()
watch.close()
time.sleep(1)  # of a thread that still waits nothing may come
print("closed", flush=True)
sys.stdout.flush()
os._exit(0)
"""


Store = tuple["subprocess.Popen[str]", int]


@pytest.fixture
def store() -> Iterator[Store]:
    """A real store in a process of its own, which a test may stop; and its port."""
    server = subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        yield server, int(server.stdout.readline())
    finally:
        server.kill()
        server.communicate()


@contextmanager
def watched(port: int, folder: Path, phase: str = "forward") -> "Iterator[subprocess.Popen[str]]":
    """A rank whose watch has a limit of 2 s; it closes that and ends well when it gets a line."""
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    rank = subprocess.Popen(
        [sys.executable, "-c", WATCHED, str(folder), phase],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert rank.stdout is not None
        assert rank.stdout.readline() == "watched\n"
        time.sleep(1)
        yield rank
    finally:
        rank.kill()
        rank.communicate()


def test_a_store_that_does_not_answer_ends_a_rank(store: Store, tmp_path: Path) -> None:
    server, port = store
    with watched(port, tmp_path) as rank:
        server.send_signal(signal.SIGSTOP)
        stopped = time.monotonic()
        assert rank.wait(30) == 1
        seconds = time.monotonic() - stopped
        print(f"a limit of 2 s: ended after {seconds:.1f} s")
        said = rank.communicate()[0]
    assert seconds >= 1.5
    words = r"node 0 at 127\.0\.0\.1 does not answer any more, for \d+ s: .*; rank 0 on \S+ is at step 3, micro-step 1, forward"
    assert re.fullmatch(rf"watch: {words}\n", said), said
    assert re.match(rf"{words}; stacks are in ", (tmp_path / "reported").read_text())
    assert "in _look\n" in (tmp_path / "stacks" / "rank-0.txt").read_text(), "where it waits"


def test_a_store_that_is_gone_ends_a_rank(store: Store, tmp_path: Path) -> None:
    """Where asking is refused at once."""
    server, port = store
    with watched(port, tmp_path) as rank:
        server.kill()
        assert rank.wait(30) == 1
    assert "node 0 at 127.0.0.1 does not answer any more" in (tmp_path / "reported").read_text()


def well_after(rank: "subprocess.Popen[str]", folder: Path) -> None:
    """It is watched still, and ends well."""
    assert rank.poll() is None, rank.communicate()[0]
    assert rank.communicate("close\n", timeout=30)[0] == "closed\n"
    assert rank.returncode == 0
    assert not (folder / "reported").exists()
    assert not (folder / "stacks").exists()


def test_a_store_that_answers_late_ends_nobody(store: Store, tmp_path: Path) -> None:
    server, port = store
    with watched(port, tmp_path) as rank:
        for _ in range(4):
            server.send_signal(signal.SIGSTOP)
            time.sleep(0.8)
            server.send_signal(signal.SIGCONT)
            time.sleep(0.6)
        well_after(rank, tmp_path)


@pytest.mark.parametrize("both", [False, True], ids=["the rank", "the rank, then the store"])
def test_a_rank_that_was_itself_stopped_blames_nobody(both: bool, store: Store, tmp_path: Path) -> None:
    """As where a machine was asleep, in which the network wakes a moment later."""
    server, port = store
    with watched(port, tmp_path) as rank:
        rank.send_signal(signal.SIGSTOP)
        if both:
            server.send_signal(signal.SIGSTOP)
        time.sleep(4)
        rank.send_signal(signal.SIGCONT)
        time.sleep(1)
        server.send_signal(signal.SIGCONT)
        time.sleep(1)
        well_after(rank, tmp_path)


def test_while_loading_a_store_has_four_times_as_long(store: Store, tmp_path: Path) -> None:
    server, port = store
    with watched(port, tmp_path, "loading") as rank:
        server.send_signal(signal.SIGSTOP)
        time.sleep(5)
        assert rank.poll() is None
        assert rank.wait(30) == 1


def test_at_the_end_of_a_run_a_store_need_not_answer(store: Store, tmp_path: Path) -> None:
    server, port = store
    with watched(port, tmp_path) as rank:
        server.send_signal(signal.SIGSTOP)
        time.sleep(0.5)
        assert rank.stdin is not None
        began = time.monotonic()
        rank.stdin.write("close\n")
        rank.stdin.flush()
        assert rank.wait(30) == 0
        assert time.monotonic() - began < 4
    assert not (tmp_path / "reported").exists()


def test_the_stacks_of_the_launch_before_are_kept(tmp_path: Path) -> None:
    (tmp_path / "rank-0.txt").write_text("Thread 1")
    watch = Watch(
        0, 1, torch.distributed.HashStore(), 60.0,
        place=lambda: Place(0, "forward", 1, 1), pace=lambda: None, stacks=tmp_path, report=print, say=print,
    )  # fmt: skip
    watch.close()
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"rank-0-before.txt": "Thread 1"}


# ranks that differ


def test_ranks_that_are_alike_pass() -> None:
    assert drift([{"peft": "0.21"}] * 3, ["a", "a", "b"]) is None


def test_the_odd_ranks_are_named_with_both_values() -> None:
    facts = [{"peft": "0.21", "train.seed": "0"}, {"peft": "0.20", "train.seed": "0"}, {"peft": "0.21", "train.seed": "0"}]
    assert drift(facts, ["a", "b", "c"]) == "rank 1 on b: peft is 0.20 (on rank 0: 0.21)"
    assert drift([facts[1], facts[0], facts[0]], ["a", "b", "c"]) == "rank 0 on a: peft is 0.20 (on rank 1: 0.21)"
    assert drift([facts[0], facts[1], facts[1], facts[0], facts[0]], list("abbcc")) == "ranks 1, 2 on b: peft is 0.20 (on rank 0: 0.21)"
    two = [facts[0], {"train.seed": "7"}]
    assert drift(two, ["a", "b"]) == "rank 1 on b: peft is nothing (on rank 0: 0.21), train.seed is 7 (on rank 0: 0)"


def test_the_fingerprint_of_the_code_is_its_content(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\n")
    first = code_fingerprint(tmp_path)
    assert code_fingerprint(tmp_path) == first
    (tmp_path / "notes.txt").write_text("not code")
    assert code_fingerprint(tmp_path) == first
    (tmp_path / "a.py").write_text("x = 2\n")
    assert code_fingerprint(tmp_path) != first
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    (tmp_path / "b.py").write_text("x = 1\n")
    assert code_fingerprint(tmp_path) != first
    assert len(code_fingerprint()) == 16


def test_places_of_one_machine_are_no_difference() -> None:
    facts = recipe_facts(recipe())
    assert facts["train.seed"] == "0"
    assert not {"data.dir", "model.path"} & facts.keys()


# memory


def test_an_error_in_a_real_step_says_what_to_type(tmp_path: Path) -> None:
    """One process: a GPU's error raised in the backward of a prepared model, explained by the runtime that ran it."""
    code = """
import json, os, sys
sys.path.insert(0, os.getcwd())
import torch
from mistral_dist.config import Recipe
from mistral_dist.runtime.engine import Runtime
recipe = Recipe.model_validate(json.loads(os.environ["RECIPE"]))
runtime = Runtime(recipe)
model = torch.nn.Sequential(torch.nn.Linear(1024, 1024), torch.nn.Linear(1024, 1024))
model[0].requires_grad_(False)
runtime.prepare(model, torch.optim.AdamW(model[1].parameters(), foreach=False))
def step(number, error=None):
    for micro in (1, 2):
        with runtime.micro_step(number, micro, [512, 300]):
            loss = runtime.model(torch.ones(4, 1024)).sum()
            runtime.backward(loss)
            if error is not None and micro == 2:
                raise error
    runtime.finish_step()
step(1)
try:
    step(2, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."))
except Exception as error:
    told = runtime.explain(error)
    assert runtime.explain(told) is told and runtime.explain(ValueError("x")).args == ("x",)
    print(f"{type(told).__name__}: {told}")
"""
    packs = {"global_batch_size": 4, "micro_batch_size": 2, "gradient_checkpointing": False}
    script = tmp_path / "one.py"
    script.write_text(code)
    environment = {**os.environ, "RECIPE": recipe(**packs).model_dump_json(), "WORLD_SIZE": "1", "RANK": "0"}
    done = subprocess.run([sys.executable, str(script)], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()[-1]
    assert said.startswith(f"TrainingError: rank 0 on {os.uname().nodename} ran out of GPU memory in step 2, micro-step 2, backward: ")
    assert "GiB at the peak (frozen base 0.00, adapter 0.00, gradients 0.00, optimizer 0.01, activations and the rest " in said
    assert "the longest pack of the micro-batch has 512 tokens" in said
    assert said.endswith(
        "Go on with train.micro_batch_size=1 train.gradient_checkpointing=true; or start a new run with data.max_length=1024 run.dir=..."
    )


def test_memory_is_told_by_part() -> None:
    gib = 2**30
    parts = {"frozen base": 4 * gib, "adapter": gib // 4, "gradients": 0, "optimizer": gib // 2}
    scene = Scene(3, "gpu07", "step 12, update", "GPU memory", 23 * gib, 24 * gib, parts, [])
    assert explanation(scene, recipe()) == (
        "rank 3 on gpu07 ran out of GPU memory in step 12, update: 23.00 GiB of 24.00 at the peak (frozen base 4.00, adapter 0.25,"
        " optimizer 0.50, activations and the rest 18.25). Start a new run with data.max_length=1024 run.dir=..."
    )


def test_memory_in_a_validation_has_remedies_of_its_own() -> None:
    assert str(Place(9, VALIDATION, 40, 3)) == "step 40, batch 3, validation"
    scene = Scene(0, "gpu07", str(Place(9, VALIDATION, 40, 3)), "GPU memory", 2**30, None, {}, [512])
    validated = recipe(eval_steps=20, micro_batch_size=4, gradient_checkpointing=False)
    told = explanation(scene, validated)
    assert "in step 40, batch 3, validation: " in told
    assert told.endswith("Go on with train.eval_steps=null; or start a new run with data.max_length=1024 run.dir=...")
    decides = recipe(eval_steps=20, early_stopping_patience=2, micro_batch_size=4)
    assert explanation(scene, decides).endswith(". Start a new run with data.max_length=1024 run.dir=...")


def test_what_is_out_of_memory_and_what_is_not() -> None:
    cpu = "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"
    cublas = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
    onednn = RuntimeError("could not create a primitive")
    for error in (torch.OutOfMemoryError("x"), MemoryError(), OSError(12, "Cannot allocate memory"), RuntimeError(cpu), cublas, onednn):
        assert is_out_of_memory(error)
    for other in (OSError(28, "No space left on device"), RuntimeError("shape"), ValueError("out of memory")):
        assert not is_out_of_memory(other)


# causes

SUMMARY = """
Root Cause (first observed failure):
[0]:
  time      : 2026-11-23_19:40:00
  host      : node1
  rank      : 1 (local_rank: 1)
  exitcode  : -{number} (pid: 4242)
  error_file: <N/A>
  traceback : Signal {number} received by PID 4242
"""


@pytest.mark.parametrize(
    ("log", "kills", "words"),
    [
        (SUMMARY.format(number=9), 0, ["rank 1 (process 4242) was killed (signal 9)", "where nobody did that, memory was full"]),
        (SUMMARY.format(number=9), 1, ["was killed (signal 9) by the kernel, because memory was full", "train.micro_batch_size"]),
        (SUMMARY.format(number=11), 0, ["rank 1 (process 4242) crashed (SIGSEGV, signal 11)"]),
        ("CalledProcessError: Command '[..]' died with <Signals.SIGKILL: 9>.", 0, ["the worker was killed (signal 9)"]),
        (
            "DistStoreError: Timed out after 13 seconds waiting for clients. 1/2 clients joined.",
            0,
            ["only 1 of 2 nodes came within 13 s"],
        ),
        (
            "DistStoreError: wait timeout after 10000ms, keys: /none/torchelastic/assigned_ranks/1",
            0,
            ["node 0 has not begun for 10 s"],
        ),
        (
            "The client socket has timed out after 12000ms while trying to connect to (10.0.0.1, 29500).",
            0,
            ["nobody answers at 10.0.0.1, port 29500, for 12 s", "node 0"],
        ),
        (
            "ConnectionError: Tried to launch distributed communication on port `29500`, but another process is utilizing it.",
            0,
            ["port 29500"],
        ),
        ("errno: 98 ... port: 29500, useIpv6: false, EADDRINUSE", 0, ["port 29500 is in use on this machine"]),
    ],
)
def test_the_cause_is_told_in_a_line(log: str, kills: int, words: list[str]) -> None:
    found = cause(log, kills)
    assert found is not None
    assert "\n" not in found
    for word in words:
        assert word in found


def test_of_two_that_end_together_the_killed_one_is_named() -> None:
    other = SUMMARY.format(number=9).replace("Root Cause (first observed failure):", "Failures:").replace("rank      : 1", "rank      : 2")
    lost = SUMMARY.format(number=9).replace(": -9", ": 1")
    assert "rank 2 (process 4242) was killed" in str(cause(other + lost))
    assert cause(other.replace("19:40:00", "19:40:30") + lost) is None, "killed by torchrun, half a minute after the first had failed"


def test_what_is_not_recognised_is_not_guessed() -> None:
    assert cause("step 1/20 loss 2.0\n" + SUMMARY.format(number=9).replace(": -9", ": 1")) is None
    assert cause("") is None


def test_the_packs_of_a_batch_are_measured() -> None:
    import numpy as np

    from mistral_dist.data.encode import Encoded
    from mistral_dist.data.stream import Batch, collate

    rows = [Encoded(np.arange(n), np.array([1])) for n in (5, 3, 7)]
    assert Batch(**collate(rows), ids=((0, ("a", "b")), (2, ("c",)))).packs == [8, 7]
    assert Batch(**collate([]), ids=()).packs == []
    assert json.dumps(Batch(**collate(rows[:1]), ids=((4, ("a",)),)).packs) == "[5]"


def test_who_was_asked_stays_asked() -> None:
    """Also where the time that is kept for a save becomes shorter: the others have been told."""
    deadline = Deadline(time.monotonic(), 100.0)
    control = Control(1, StopRequest(), deadline, datetime.timedelta(seconds=1))
    assert not control.is_asked(save=20.0, saves=1)
    assert control.is_asked(save=60.0, saves=2)
    assert control.is_asked(save=1.0, saves=1)
    with pytest.raises(StopAgreed, match=r"by train\.max_seconds"):
        control.agree(save=1.0)


def test_where_all_have_agreed_each_is_asked() -> None:
    """So that none of them waits for its data any more."""
    stop = StopRequest()
    control = Control(1, stop, Deadline(0.0, None), datetime.timedelta(seconds=1))
    stop.signal = signal.SIGTERM
    with pytest.raises(StopAgreed):
        control.check()
    stop.signal = None
    assert control.is_asked()
