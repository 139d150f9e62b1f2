"""Out of memory: which rank, where, what held it, and what to type."""

import errno
import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mistral_dist.config import Recipe
from mistral_dist.runtime.watch import VALIDATION

GIB = 2**30
REFUSED = (
    *("can't allocate memory", "could not create a primitive"),
    *("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED"),
)
"""On the CPU: by PyTorch, and by oneDNN for its kernels. On a GPU: by CUDA and NCCL, and by libraries at their first call."""


@dataclass(frozen=True)
class Scene:
    """What was known when memory ran out."""

    rank: int
    host: str
    place: str
    """Step, micro-step, phase."""
    what: str
    """GPU memory, or memory."""
    peak: int
    """Bytes, of this rank since it began."""
    capacity: int | None
    """Bytes of the device."""
    parts: Mapping[str, int]
    """Bytes that stay from step to step, by what they hold."""
    packs: Sequence[int]
    """Tokens of the packs in the micro-batch."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory was refused: by the GPU's allocator, PyTorch's on the CPU, Python or the kernel."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(word in str(error) for word in REFUSED)


def refuses_in_time(device: torch.device) -> bool:
    """Whether a device says that memory is full, and goes on. For a CPU the kernel ends the process instead."""
    return device.type == "cuda"


def forget(device: torch.device) -> None:
    """Give back what is cached of what is no longer used, and count the peak from here on."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def explanation(scene: Scene, recipe: Recipe) -> str:
    """One line: rank, phase, peak by part, longest pack, and the overrides that help."""
    held = [f"{name} {_gib(size)}" for name, size in scene.parts.items() if size]
    rest = scene.peak - sum(scene.parts.values())
    if rest > 0:
        held.append(f"activations and the rest {_gib(rest)}")
    of = f" of {_gib(scene.capacity)}" if scene.capacity else ""
    packs = f"; the longest pack of the micro-batch has {max(scene.packs):,} tokens" if scene.packs else ""
    return (
        f"rank {scene.rank} on {scene.host} ran out of {scene.what} in {scene.place}: {_gib(scene.peak)} GiB{of} at the peak"
        f" ({', '.join(held)}){packs}. {remedy(recipe, VALIDATION in scene.place)}"
    )


def remedy(recipe: Recipe, in_validation: bool = False) -> str:
    """What to type, what costs least first; the last of them needs a run of its own."""
    train, free = recipe.train, []
    if in_validation:  # of one pack, whose activations nobody keeps
        free += [] if train.validation_decides else ["train.eval_steps=null"]
    else:
        free += [f"train.micro_batch_size={train.packs_per_forward // 2}"] if train.packs_per_forward > 1 else []
        free += [] if train.gradient_checkpointing else ["train.gradient_checkpointing=true"]
    go_on = f"Go on with {' '.join(free)}; or start" if free else "Start"
    return f"{go_on} a new run with data.max_length={recipe.data.max_length // 2} run.dir=..."


def standing(model: Any, optimizer: Any, device: torch.device) -> dict[str, int]:
    """Bytes of this rank on `device` that stay from step to step, by part; of what is sharded, this rank's shard."""
    parts = dict.fromkeys(("frozen base", "adapter", "gradients", "optimizer"), 0)
    for parameter in model.parameters() if model is not None else ():
        held = getattr(parameter, "ds_tensor", parameter)
        parts["adapter" if parameter.requires_grad else "frozen base"] += held.numel() * held.element_size()
        parts["gradients"] += _bytes(parameter.grad)
    inner = getattr(optimizer, "optimizer", optimizer)
    for state in getattr(inner, "state", {}).values():
        # an offloaded state lies elsewhere
        parts["optimizer"] += sum(_bytes(value) for value in state.values() if getattr(value, "device", device).type == device.type)
    return parts


def _bytes(tensor: Any) -> int:
    return tensor.numel() * tensor.element_size() if isinstance(tensor, torch.Tensor) else 0


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}"
