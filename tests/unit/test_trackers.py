"""Experiment trackers: one run in each, however often it is started; one that fails ends nothing."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import accelerate
import pytest

from mistral_dist.errors import RecipeError
from mistral_dist.runtime import trackers as module
from mistral_dist.runtime.trackers import Trackers, check_trackers


def shown(folder: Path, name: str) -> list[tuple[int, float]]:
    """What tensorboard draws."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def launch(folder: Path, names: tuple[str, ...], after: int, losses: dict[int, float], shown: float = 0) -> list[str]:
    """One start of a run: it goes on after a step, the launch before it got as far as `shown`, and it shows these losses."""
    said: list[str] = []
    trackers = Trackers(names, folder, "tests", {"lora.r": 16}, said.append)
    trackers.start(after, shown)
    for step, loss in losses.items():
        trackers.log(step, {"train/loss": loss, "train/words": "no number", "train/grad_norm": None})
    trackers.close()
    return said


def test_a_run_that_goes_on_is_one_curve(tmp_path: Path) -> None:
    """Killed after step 5, it goes on from a checkpoint of step 3: steps 4 and 5 are shown as they were made the second time."""
    launch(tmp_path, ("tensorboard",), 0, dict.fromkeys(range(1, 6), 1.0))
    assert launch(tmp_path, ("tensorboard",), 3, dict.fromkeys(range(4, 8), 2.0)) == []
    assert shown(tmp_path, "train/loss") == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0), (5, 2.0), (6, 2.0), (7, 2.0)]


def test_a_way_back_does_not_bend_the_curve(tmp_path: Path) -> None:
    trackers = Trackers(["tensorboard"], tmp_path, "tests", {}, print)
    trackers.start(0)
    for step in range(1, 6):
        trackers.log(step, {"train/loss": 9.0 if step > 2 else 1.0})
    trackers.go_back(2)
    for step in range(3, 5):
        trackers.log(step, {"train/loss": 1.0})
    trackers.close()
    assert shown(tmp_path, "train/loss") == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 1.0)]


def test_what_cannot_be_taken_back_is_not_shown_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed twice before it was as far as the first time, and once gone back: for such a tracker no step comes twice, or too late."""
    drawn: list[tuple[int, dict[str, float]]] = []

    class Tracker:
        def store_init_configuration(self, _: Any) -> None:
            pass

        def log(self, values: dict[str, float], step: int) -> None:
            drawn.append((step, values))

        def finish(self) -> None:
            pass

    monkeypatch.setitem(module.START, "mlflow", lambda *_: (Tracker(), "called"))
    launch(tmp_path, ("mlflow",), 0, dict.fromkeys(range(1, 6), 1.0))
    launch(tmp_path, ("mlflow",), 2, {3: 2.0}, shown=5)
    launch(tmp_path, ("mlflow",), 2, dict.fromkeys(range(3, 8), 3.0), shown=3)
    assert [(step, values["train/loss"]) for step, values in drawn] == [*((step, 1.0) for step in range(1, 6)), (6, 3.0), (7, 3.0)]
    drawn.clear()
    trackers = Trackers(["mlflow"], tmp_path, "tests", {}, print)
    trackers.start(7, 7)
    trackers.log(8, {"train/loss": 4.0})
    trackers.log(8, {"eval/loss": 5.0}, after=0.5)
    trackers.go_back(6)
    for step in (7, 8, 9):
        trackers.log(step, {"train/loss": 6.0})
    assert drawn == [(8, {"train/loss": 4.0}), (8, {"eval/loss": 5.0}), (9, {"train/loss": 6.0})]


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_each_start_continues_the_same_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(name, reason=f"{name} is not installed (pip install {name})")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    run = tmp_path / "run"
    run.mkdir()
    accelerate.PartialState()  # which a training always has, and wandb's tracker asks for
    assert launch(run, (name,), 0, {1: 1.0, 2: 1.0}) == []
    called = json.loads((run / "trackers.json").read_text())[name]
    assert launch(run, (name,), 1, {2: 2.0, 3: 2.0}, shown=2) == []
    assert json.loads((run / "trackers.json").read_text())[name] == called
    if name == "wandb":
        assert len(list((run / "wandb").glob(f"offline-run-*-{called}"))) == 2
    if name == "mlflow":
        import mlflow

        points = mlflow.MlflowClient().get_metric_history(called, "train/loss")
        assert [(point.step, point.value) for point in points] == [(1, 1.0), (2, 1.0), (3, 2.0)]


def test_one_that_fails_is_left_out_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def store_init_configuration(self, _: Any) -> None:
            pass

        def log(self, _: Any, **__: Any) -> None:
            raise ConnectionError("no network\nat all")

        def finish(self) -> None:
            raise AssertionError("it was left out")

    monkeypatch.setitem(module.START, "wandb", lambda *_: (Broken(), "called"))
    said = launch(tmp_path, ("wandb", "tensorboard"), 0, {1: 1.0, 2: 1.0})
    assert said == ["note: wandb failed (ConnectionError: no network at all); the run goes on without it"]
    assert shown(tmp_path, "train/loss") == [(1, 1.0), (2, 1.0)]


def test_a_tracker_that_is_not_installed_is_told_before_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    check_trackers([])
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(RecipeError, match=r"log\.trackers: wandb is not installed: pip install wandb, or take it out"):
        check_trackers(["wandb"])
