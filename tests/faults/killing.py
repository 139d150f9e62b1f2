"""SIGKILL to a worker inside a save, at a point of it."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mistral_dist import checkpoint

POINTS = {
    # a function of the room: (the point before it, the point after it)
    "aside_of": ("before the folder", ""),
    "_manifest": ("before the manifest", ""),
    "publish": ("before the rename", "after the rename"),
}


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_in_save(point: str, step: int) -> None:
    """Wrap the functions by which checkpoint-<step> is written."""
    module: Any = checkpoint

    def is_it(paths: tuple[Any, ...]) -> bool:
        return any(f"checkpoint-{step}" in str(path) for path in paths)

    def wrapped(function: Callable[..., Any], before: str, after: str) -> Callable[..., Any]:
        def call(*paths: Any) -> Any:
            if point == before and is_it(paths):
                die()
            found = function(*paths)
            if point == after and is_it(paths):
                die()
            return found

        return call

    for name, (before, after) in POINTS.items():
        setattr(module, name, wrapped(getattr(module, name), before, after))
    write = module._write_tensors

    def torn(file: Path, tensors: Any) -> None:
        write(file, tensors)
        if point == "inside a tensor file" and is_it((file,)) and file.name == "optimizer.safetensors":
            os.truncate(file, file.stat().st_size // 2)
            die()

    module._write_tensors = torn
