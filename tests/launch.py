"""Starting the real thing from tests: `mistral-dist`, its launcher and workers, as a user would."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

ROOT = Path(__file__).parent.parent
COMMAND = [sys.executable, "-m", "mistral_dist.cli"]
LIMIT = 600
"""Seconds after which something hangs."""
STAGES = [pytest.param(zero, marks=pytest.mark.matrix) if zero != 2 else zero for zero in (0, 1, 2, 3)]
"""For `parametrize`: ZeRO-2 in every test run, the others in `make faults`."""


def mistral_dist(*words: str | Path, cwd: Path = ROOT, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run a command to its end."""
    return subprocess.run(
        [*COMMAND, *map(str, words)], cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, timeout=LIMIT, check=False
    )


def stage(zero: int | str) -> list[str]:
    """The words for a ZeRO stage: 0 to 3, "2+offload" or "3+offload"."""
    number, _, offload = str(zero).partition("+")
    return ["--zero", number, *(["--offload"] if offload else [])]


def train(recipe: Path, run: Path, *overrides: str, processes: int = 2, zero: int | str = 2, **environment: str) -> Path:
    """Train a recipe to its end in a run directory; return that."""
    words = ["train", recipe, f"run.dir={run}", *overrides, "--processes", str(processes), *stage(zero)]
    done = mistral_dist(*words, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return run


def resume(recipe: Path, run: Path, *overrides: str, processes: int = 2, zero: int | str = 2, **environment: str) -> Path:
    """As `train`, of a run that was left; and it goes on from a checkpoint, not from the start."""
    log = run / "log.txt"
    before = log.stat().st_size
    train(recipe, run, *overrides, processes=processes, zero=zero, **environment)
    told = log.read_bytes()[before:].decode(errors="replace")
    found = re.search(r"going on from checkpoint-(\d+)", told)
    assert found is not None and int(found[1]) > 0, told
    return run


def run_dir(recipe: Path) -> Path:
    return Path(json.loads(recipe.read_text())["run"]["dir"])


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


CLOCKS = ("tokens_per_second", "seconds", "memory_bytes", "save")


def metrics(run: Path) -> list[dict[str, Any]]:
    """What a run measured, steps and validations, without clocks and memory."""
    return [without_clocks(entry) for entry in lines(run / "metrics.jsonl")]


def without_clocks(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: without_clocks(value) if key == "eval" else value for key, value in entry.items() if key not in CLOCKS}


def losses(run: Path) -> list[float]:
    return [entry["loss"] for entry in metrics(run) if "eval" not in entry]


def validations(run: Path) -> dict[int, dict[str, Any]]:
    """What each validation of a run showed, by step; each once."""
    found = [(entry["step"], entry["eval"]) for entry in metrics(run) if "eval" in entry]
    assert len({step for step, _ in found}) == len(found), found
    return dict(found)


def status(run: Path) -> dict[str, Any]:
    return json.loads((run / "status.json").read_text())


@contextmanager
def training(
    recipe: Path, run: Path, *overrides: str, until: int, processes: int = 2, zero: int | str = 2, **environment: str
) -> "Iterator[subprocess.Popen[str]]":
    """A training that has made `until` steps; whatever of it still lives is killed at the end."""
    words = ["train", str(recipe), f"run.dir={run}", *overrides, "--processes", str(processes), *stage(zero)]
    started = subprocess.Popen(
        [*COMMAND, *words], cwd=ROOT, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        wait_for(lambda: (run / "metrics.jsonl").is_file() and len(losses_so_far(run)) >= until, started)
        yield started
    finally:
        for process in [started.pid, *(child.pid for child in workers(run))]:
            kill(process)
        if started.stdout is not None and not started.stdout.closed:  # by who waited for it in vain
            started.communicate()


def losses_so_far(run: Path) -> list[str]:
    return re.findall(r'"epoch": [^,]+, "loss": ([^,]+)', (run / "metrics.jsonl").read_text())


def wait_for(condition: Any, process: "subprocess.Popen[str] | None" = None) -> None:
    started = time.monotonic()
    while not condition():
        assert process is None or process.poll() is None, process.communicate()[0]
        assert time.monotonic() - started < LIMIT, "waited too long"
        time.sleep(0.05)


def workers(run: Path) -> list[psutil.Process]:
    """The workers and agents of a training in a run directory, found by their command line."""
    found = []
    for process in psutil.process_iter():
        try:
            command = " ".join(process.cmdline())
            if "mistral_dist.train" in command and f"run.dir={run} " in f"{command} " and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


@contextmanager
def small_disk(path: Path, size: str) -> Iterator[Path]:
    """A file system of its own in memory; skips where it may not be mounted."""
    path.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"a file system cannot be mounted here: {done.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def fill(folder: Path) -> Path:
    """A file that takes all the room that is left."""
    file = folder / "filler"
    with open(file, "wb", buffering=0) as stream:
        for size in (1 << 16, 1 << 12, 1):
            with suppress(OSError):
                while stream.write(b"x" * size):
                    pass
    assert os.statvfs(folder).f_bavail == 0
    return file
