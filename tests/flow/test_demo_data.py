"""The demo's data: the same wherever the same libraries are installed."""

import subprocess
import sys
from pathlib import Path

from tests.launch import ROOT


def test_two_collections_are_equal_to_the_byte(tmp_path: Path) -> None:
    files = [tmp_path / "first.jsonl", tmp_path / "second.jsonl"]
    for seed, file in enumerate(files):
        environment = {"PYTHONHASHSEED": str(seed), "PATH": "/usr/bin:/bin", "HOME": str(Path.home()), "PYTHONPATH": str(ROOT)}
        subprocess.run([sys.executable, "-m", "mistral_dist.demo", str(file)], check=True, capture_output=True, env=environment)
    assert files[0].read_bytes() == files[1].read_bytes()
    assert len(files[0].read_text().splitlines()) > 3500
