"""Where a number that is none first appears: the operation whose gradient it is, and the module that gave it."""

import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from mistral_dist.data.stream import Batch
from mistral_dist.debug.findings import Finding
from mistral_dist.loss import summed_loss

IS_ANOMALY = re.compile(r"Function '(\w+)' returned nan values")


def anomaly(error: RuntimeError, place: str, traces: Sequence[str], model: Any, batch: Batch) -> Finding | None:
    """What anomaly detection says, and where the forward pass went wrong, if it did; None for an error of another kind.

    `place`: step, micro-step, phase. `traces`: the warnings in the meantime, among which torch shows the forward's stack.
    """
    found = IS_ANOMALY.search(str(error))
    if found is None:
        return None
    module = first_odd_module(model, batch)
    if module is not None:
        why = f"the forward pass gives numbers that are not finite, first {module}"
    else:
        called = next((line for trace in traces if "forward call" in trace for line in reversed(_ours(trace))), "")
        why = f"the gradient of {found[1]} is not a number{f', of {called}' if called else ''}; every module's output is finite"
    return Finding("anomaly detection", False, f"{place}: {why}")


def _ours(trace: str) -> list[str]:
    """The places of a stack in the package or in the model's code, e.g. `loss.py:21 in summed_loss`."""
    places = re.findall(r'File "([^"]+)", line (\d+), in (\w+)', trace)
    return [
        f"{path.rpartition('/')[2]}:{line} in {name}" for path, line, name in places if re.search(r"/(mistral_dist|models|peft)/", path)
    ]


@torch.no_grad()
def first_odd_module(model: Any, batch: Batch) -> str | None:
    """The first module in the order of the forward whose output is not finite though its input is; None where there is none."""
    found: list[str] = []

    def look(name: str) -> Callable[[Any, Any, Any], None]:
        def hook(_module: Any, given: Any, made: Any) -> None:
            if not found and _is_odd(made) and not _is_odd(given):
                found.append(f"in {name} ({type(_module).__name__})")

        return hook

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if not list(module.children()):
                hooks.callback(module.register_forward_hook(look(name)).remove)
        loss = summed_loss(model, batch)
    return found[0] if found else None if torch.isfinite(loss) else "in the loss, of logits that are finite"


def _is_odd(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.is_floating_point() and not bool(torch.isfinite(value).all())
    return isinstance(value, tuple | list) and any(map(_is_odd, value))
