"""A real server, started as a user would, and stopped."""

import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import openai
import psutil

from tests.launch import COMMAND, ROOT

LIMIT = 600
"""Seconds until a server answers."""


@dataclass(frozen=True)
class Server:
    """One that answers."""

    url: str
    process: "subprocess.Popen[bytes]"
    log: Path
    key: str
    place: Path
    """What is served."""

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.key, max_retries=0, timeout=120)

    def get(self, path: str) -> str:
        """What it answers; raises OSError for another status than 200."""
        request = urllib.request.Request(f"{self.url}{path}", headers={"Authorization": f"Bearer {self.key}"})
        with urllib.request.urlopen(request, timeout=10) as reply:
            return str(reply.read().decode())

    def memory(self) -> int:
        """Proportional set size of the server with all its children, in bytes."""
        processes = [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]
        return sum(process.memory_full_info().pss for process in processes)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def serving(*words: str | Path, flags: tuple[str, ...] = (), log: Path, **environment: str) -> Iterator[Server]:
    """`mistral-dist serve` with some words, from its first answer on; asked to stop at the end, it ends by itself, with what it began."""
    port = free_port()
    command = [*COMMAND, "serve", *map(str, words), "--port", str(port), *(["--", *flags] if flags else [])]
    with log.open("wb") as out:
        process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **environment}, stdout=out, stderr=out)
    server = Server(f"http://127.0.0.1:{port}", process, log, environment.get("VLLM_API_KEY", "none"), Path(words[0]))
    try:
        wait_until_healthy(server)
        yield server
        children = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        process.wait(60)
        _, alive = psutil.wait_procs(children, 20)
        assert not alive, "a graceful stop leaves no process"
    finally:
        for child in [*psutil.Process(process.pid).children(recursive=True), process] if process.poll() is None else []:
            child.kill()
        process.wait()


def wait_until_healthy(server: Server) -> None:
    started = time.monotonic()
    while time.monotonic() - started < LIMIT:
        assert server.process.poll() is None, server.log.read_text()[-4000:]
        with suppress(OSError):
            server.get("/health")
            return
        time.sleep(1)
    raise AssertionError(server.log.read_text()[-4000:])
