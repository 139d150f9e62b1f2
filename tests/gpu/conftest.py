"""Where the figures of the card go."""

import json
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from tests.launch import ROOT

FILE = pytest.StashKey[Path]()


@pytest.fixture(scope="session")
def figures(request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    """What was measured, by name; at the end in a file, whatever failed."""
    versions = {name: metadata.version(name) for name in ("torch", "transformers", "peft", "bitsandbytes", "deepspeed")}
    card = torch.cuda.get_device_properties(0)
    memory = round(card.total_memory / 2**30, 1)
    found: dict[str, Any] = {"card": card.name, "memory_gib": memory, "cuda": torch.version.cuda, "versions": versions}
    yield found
    file = ROOT / "build" / "gpu" / "figures.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{file}.lock"):  # of several processes (pytest -n) each measures something
        before = json.loads(file.read_text()) if file.is_file() else {}
        file.write_text(json.dumps({**before, **found}, indent=2) + "\n")
    request.config.stash[FILE] = file


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if FILE in config.stash:
        terminalreporter.write_line(f"memory and tokens/s: {config.stash[FILE]}")
