"""Python imports this at its start where the folder is on PYTHONPATH: a worker then kills itself inside a save.

KILL_IN_SAVE names the point, KILL_AT_STEP the checkpoint. The product holds nothing for this: its own functions are wrapped.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(point: str, name: str) -> None:
    from mistral_dist import checkpoint

    module: Any = checkpoint
    publish, write, manifest, aside = module.publish, module._write_tensors, module._manifest, module.aside_of

    def is_it(path: Path) -> bool:
        return name in str(path)

    def aside_of(target: Path) -> Path:
        if point == "before the folder" and is_it(target):
            die()
        return aside(target)

    def write_tensors(file: Path, tensors: Any) -> None:
        write(file, tensors)
        if point == "inside a tensor file" and is_it(file) and file.name == "optimizer.safetensors":
            os.truncate(file, file.stat().st_size // 2)
            die()

    def manifest_of(folder: Path) -> Any:
        if point == "before the manifest" and is_it(folder):
            die()
        return manifest(folder)

    def publish_it(folder: Path, target: Path) -> None:
        if point == "before the rename" and is_it(target):
            die()
        publish(folder, target)
        if point == "after the rename" and is_it(target):
            die()

    module.aside_of, module._write_tensors, module._manifest, module.publish = aside_of, write_tensors, manifest_of, publish_it


# the workers; not `mistral-dist` itself, nor its launcher
if "mistral_dist.train" in sys.orig_argv and not any("accelerate" in word for word in sys.orig_argv) and os.environ.get("RANK") == "0":
    arm(os.environ["KILL_IN_SAVE"], f"checkpoint-{os.environ['KILL_AT_STEP']}")
