"""What a run directory says, read for a person to look at. Nothing here is needed to be there but the run itself."""

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mistral_dist.card import publishable
from mistral_dist.checkpoint import written_with
from mistral_dist.config import Recipe
from mistral_dist.data.prepared import Prepared, read_manifest
from mistral_dist.data.split import TRAIN
from mistral_dist.errors import RunError
from mistral_dist.files import read_json
from mistral_dist.run import RunDirectory

Line = dict[str, Any]


@dataclass(frozen=True)
class Facts:
    """One run."""

    run: RunDirectory

    @property
    def name(self) -> str:
        """Of the run directory."""
        return self.run.path.resolve().name

    @cached_property
    def recipe(self) -> Recipe:
        """As it was resolved, without the signatures and passwords that URLs may hold."""
        return publishable(self.run.recipe())

    @cached_property
    def status(self) -> Line:
        """What status.json says."""
        return self.run.status() or {"state": "never started", "message": ""}

    @cached_property
    def _metrics(self) -> list[Line]:
        return list(_lines(self.run.path / "metrics.jsonl"))

    @property
    def steps(self) -> list[Line]:
        """What each step showed."""
        return [entry for entry in self._metrics if "eval" not in entry]

    @property
    def validations(self) -> list[Line]:
        """What each validation showed, with its step."""
        return [{"step": entry["step"], **entry["eval"]} for entry in self._metrics if "eval" in entry]

    @cached_property
    def events(self) -> list[tuple[int, str]]:
        """(step, what happened) in the order of the log: where the run was taken up again, or went back, or left steps out."""
        found: list[tuple[int, str]] = []
        if self.run.log.is_file():
            with open(self.run.log, encoding="utf-8", errors="replace") as log:
                for line in log:
                    if match := re.match(r"going on from checkpoint-(\d+)", line):
                        found.append((int(match[1]), "taken up again"))
                    elif match := re.match(r"step (\d+): (.*; back to checkpoint-\d+.*)", line):
                        found.append((int(match[1]), match[2].strip()))
        found += [(entry["step"], f"not trained: {entry['because']}") for entry in _lines(self.run.path / "untrained.jsonl")]
        return found

    @cached_property
    def test(self) -> Line | None:
        """What the evaluation found; None where there was none."""
        file = self.run.path / "evaluation" / "test.json"
        try:
            return read_json(file)
        except RunError as error:
            raise RunError(f"{error}, or evaluate again: mistral-dist evaluate {self.run.path}") from None

    def evaluation(self, name: str) -> list[Line]:
        """The lines of evaluation/NAME.jsonl: predictions, scores, worst."""
        return list(_lines(self.run.path / "evaluation" / f"{name}.jsonl"))

    @cached_property
    def manifest(self) -> Line | None:
        """What `prepare` counted; None where the data of this run are gone, or were a stream."""
        found, noted = read_manifest(self.recipe.data_dir), self._noted.get("held_out")
        return found if found is None or noted in (None, found["fingerprint"]) else None

    @cached_property
    def _noted(self) -> Line:
        """What the newest checkpoint notes of the run; nothing is verified, or moved."""
        for path in self._checkpoints:
            with suppress(OSError, ValueError):
                return dict(json.loads((path / "progress.json").read_text(encoding="utf-8")))
        return {}

    @property
    def _checkpoints(self) -> list[Path]:
        return sorted(self.run.checkpoints.glob("checkpoint-*"), key=lambda path: path.stat().st_mtime, reverse=True)

    @cached_property
    def lengths(self) -> np.ndarray | None:
        """Tokens of each train example, int32 [examples]; None where the shards are gone."""
        if self.manifest is None or not (self.recipe.data_dir / TRAIN).is_dir():
            return None
        return Prepared(self.recipe.data_dir, self.manifest).column(TRAIN, "tokens")

    @cached_property
    def versions(self) -> dict[str, str]:
        """Of the libraries that wrote the newest checkpoint that says so."""
        for path in self._checkpoints:
            with suppress(OSError, ValueError, KeyError):
                return written_with(path)
        return {}


def _lines(file: Path) -> Iterator[Line]:
    """The whole lines of a file; none where it is missing. Raises RunError for one that is damaged."""
    if not file.is_file():
        return
    with open(file, "rb") as stream:
        for number, line in enumerate(stream, 1):
            if not line.endswith(b"\n"):
                return  # it is being written, or was when its writer was killed
            try:
                yield json.loads(line)
            except ValueError:
                raise RunError(f"{file}:{number}: is damaged; mend that line, or remove it") from None
