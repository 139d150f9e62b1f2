"""The wheel, installed outside the checkout: `init` lays out a project, and a training run works there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import LABELS
from tests.launch import ROOT


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the built wheel; the libraries it needs are those of this one."""
    folder = tmp_path_factory.mktemp("installed")
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)], check=True, cwd=folder
    )
    subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
    python = folder / "venv/bin/python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", *folder.glob("*.whl")], check=True, cwd=folder)
    # behind the wheel on the path, without the checkout's editable install, which is a .pth file of its own
    libraries = next(Path(entry) for entry in sys.path if entry.endswith("site-packages"))
    site = next((folder / "venv/lib").glob("python*/site-packages"))
    (site / "libraries.pth").write_text(f"import sys; sys.path.append({str(libraries)!r})\n")
    return folder


def run(installed: Path, *words: str, cwd: Path) -> "subprocess.CompletedProcess[str]":
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        [str(installed / "venv/bin/mistral-dist"), *words],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env=environment,
    )


def test_init_and_a_training_run(installed: Path, small_model: Path, texts: list[dict[str, str]]) -> None:
    project = installed / "project"
    done = run(installed, "init", str(project), cwd=installed)
    assert done.returncode == 0, done.stderr
    wanted = {
        str(path.relative_to(ROOT)) for folder in ("configs", "launch", "slurm") for path in (ROOT / folder).rglob("*") if path.is_file()
    }
    assert {str(path.relative_to(project)) for path in project.rglob("*") if path.is_file()} == wanted
    assert os.access(project / "launch/multi_gpu.sh", os.X_OK)

    (project / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    words = [
        "configs/recipes/demo.yaml", "data.sources.0.path=rows.jsonl", f"model.path={small_model}", f"task.labels=[{','.join(LABELS)}]",
        "train.steps=3", "run.dir=runs/here",
    ]  # fmt: skip
    done = run(installed, "train", *words, cwd=project)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (project / "runs/here/adapter/adapter_model.safetensors").is_file()
    done = run(installed, "evaluate", "runs/here", cwd=project)
    assert done.returncode == 0, done.stdout + done.stderr

    (project / "configs/recipes/demo.yaml").write_text("changed\n")
    done = run(installed, "init", str(project), cwd=installed)
    assert done.returncode == 2
    assert "already there, and changed; nothing was written" in done.stderr
