"""Experiment trackers, through Accelerate: what metrics.jsonl says, for those who look at it elsewhere.

A run is one run in each tracker, however often it is started: what it is called there is kept in trackers.json. Steps that are made
again, since the run was killed or went back, are shown as they were made last by tensorboard; the others cannot take back what they
have shown, so there the first showing stays, and no curve turns back. A tracker that fails is left out from then on, which is said;
metrics.jsonl has everything.
"""

import contextlib
import importlib.util
import json
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from mistral_dist.errors import RecipeError
from mistral_dist.files import read_json, write_text


def check_trackers(names: Iterable[str]) -> None:
    """Raise RecipeError for a tracker that is not there; each has the name of its library."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise RecipeError(f"log.trackers: {name} is not installed: pip install {name}, or take it out")


class Trackers:
    """Those of one run, on rank 0."""

    def __init__(self, names: Iterable[str], folder: Path, project: str, recipe: Mapping[str, Any], say: Callable[[str], None]) -> None:
        """Nothing is started yet. `folder`: the run's, after which it is called; `recipe`: its fields, for the tracker to show."""
        self._names, self._folder, self._project, self._recipe, self._say = tuple(names), folder, project, recipe, say
        self._started: dict[str, Any] = {}
        self._shown = 0.0
        """Up to where the trackers show the run, as `journal.step_of` counts."""

    def start(self, step: int, shown: float = 0.0) -> None:
        """Begin, or go on after a step; the launch before this one got as far as `shown`, and the steps between are made again."""
        if not self._names:
            return
        file = self._folder / "trackers.json"
        known = read_json(file) or {}
        # a launch that is killed before it is as far as the one before it has shown nothing new
        self._shown = known["shown"] = max(known.get("shown", 0.0), shown)
        for name in self._names:
            with self._tolerant(name):
                tracker, called = START[name](self, known.get(name), step)
                self._started[name] = tracker
                if name not in known:
                    known[name] = called
                    if name != "tensorboard":  # which makes a run of its own of them
                        tracker.store_init_configuration({key: str(value) for key, value in self._recipe.items()})
        with contextlib.suppress(OSError):  # a full disk: the next start begins another run there
            write_text(file, json.dumps(known, indent=2) + "\n")

    def log(self, step: int, values: Mapping[str, Any], after: float = 0.0) -> None:
        """Show the numbers among these, as of a step; `after`: how much later than the step itself they were measured, in steps."""
        numbers = {key: value for key, value in values.items() if isinstance(value, int | float) and not isinstance(value, bool)}
        is_new = step + after > self._shown
        self._shown = max(self._shown, step + after)
        for name, tracker in list(self._started.items()):
            with self._tolerant(name):
                if name == "tensorboard" or is_new:
                    # wandb has a count of its own, which a validation after a step would not move
                    tracker.log({**numbers, "step": step}) if name == "wandb" else tracker.log(numbers, step=step)

    def go_back(self, step: int) -> None:
        """The run goes on after this step again."""
        if "tensorboard" in self._started:
            with self._tolerant("tensorboard"):
                self._started["tensorboard"].finish()
                self._started["tensorboard"], _ = _tensorboard(self, None, step)

    def close(self) -> None:
        """Have everything written."""
        for name, tracker in list(self._started.items()):
            with self._tolerant(name):
                tracker.finish()
        self._started = {}

    @contextlib.contextmanager
    def _tolerant(self, name: str) -> Any:
        try:
            yield
        except Exception as error:  # whatever it is, a training is worth more than a picture of it
            self._started.pop(name, None)
            self._say(f"note: {name} failed ({type(error).__name__}: {' '.join(str(error).split())[:200]}); the run goes on without it")


def _tensorboard(trackers: Trackers, _: str | None, step: int) -> tuple[Any, str]:
    from accelerate.tracking import TensorBoardTracker

    # events of later steps, which were lost or are made again, are not shown
    tracker = TensorBoardTracker("tensorboard", trackers._folder, purge_step=step + 1)
    tracker.start()
    return tracker, "tensorboard"


def _wandb(trackers: Trackers, called: str | None, _: int) -> tuple[Any, str]:
    from accelerate.tracking import WandBTracker

    called = called or uuid.uuid4().hex[:16]
    folder = trackers._folder
    tracker = WandBTracker(trackers._project, id=called, name=folder.name, dir=str(folder), resume="allow")
    tracker.start()
    tracker.tracker.define_metric("step")
    tracker.tracker.define_metric("*", step_metric="step")
    return tracker, called


def _mlflow(trackers: Trackers, called: str | None, _: int) -> tuple[Any, str]:
    from accelerate.tracking import MLflowTracker

    tracker = MLflowTracker(experiment_name=trackers._project, run_id=called, run_name=trackers._folder.name)
    tracker.start()
    return tracker, str(tracker.tracker.info.run_id)


def _trackio(trackers: Trackers, called: str | None, _: int) -> tuple[Any, str]:
    from accelerate.tracking import TrackioTracker

    called = called or f"{trackers._folder.name}-{uuid.uuid4().hex[:8]}"
    tracker = TrackioTracker(trackers._project, name=called, resume="allow")
    tracker.start()
    return tracker, called


START: dict[str, Callable[[Trackers, str | None, int], tuple[Any, str]]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "mlflow": _mlflow,
    "trackio": _trackio,
}
"""(trackers, what the run is called there if it was begun, the last step) -> the tracker, started, and what the run is called there."""
