"""SIGKILL to a worker inside a save, at a point of it."""

import os
import signal
from collections.abc import Callable
from typing import Any

from mistral_dist import checkpoint

POINTS = {
    # of the functions by which a checkpoint is written: the point before, the point after
    "aside_of": ("before the folder", ""),
    "write_tensors": ("", "inside a tensor file"),
    "_manifest": ("before the manifest", ""),
    "publish": ("before the rename", "after the rename"),
}


def kill_in_save(point: str, step: int) -> None:
    """Wrap the functions by which checkpoint-<step> is written."""
    for name, points in POINTS.items():
        if point in points:
            function = getattr(checkpoint, name)
            setattr(checkpoint, name, _deadly(function, step, before=point == points[0]))


def _deadly(function: Callable[..., Any], step: int, before: bool) -> Callable[..., Any]:
    def call(*given: Any) -> Any:
        is_it = f"checkpoint-{step}" in str(given[0])
        if is_it and before:
            os.kill(os.getpid(), signal.SIGKILL)
        found = function(*given)
        if is_it and str(given[0]).endswith("adapter_model.safetensors"):
            return found
        if is_it:
            if str(given[0]).endswith("optimizer.safetensors"):
                os.truncate(given[0], given[0].stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    return call
