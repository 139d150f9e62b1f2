"""`train.micro_batch_size: auto`: the most packs that fit into one forward, found before the first step.

Tried on the real model, loaded and with its adapter, just before it is handed to data parallelism or ZeRO. That makes a trial an
affair of one rank: gradients are asked for by value, so nothing is accumulated, no hook of an engine runs and no collective is
entered, in which the other ranks would wait for one whose memory was refused. What fails leaves nothing behind.

What ZeRO-1 and 2 share out later is reserved here in whole. Under ZeRO-3 the base is still whole, too: the size that is found fits
for certain, and what sharding then frees (of a 7B in 4 bits on many GPUs some 3 GB) is not used; a number in the recipe uses it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mistral_dist.config import Recipe
from mistral_dist.data.encode import Encoded
from mistral_dist.data.stream import Batch, collate
from mistral_dist.loss import summed_loss
from mistral_dist.model import adapter_parameters
from mistral_dist.runtime.engine import Runtime
from mistral_dist.runtime.memory import forget, is_out_of_memory, refuses_in_time

STATE_BYTES = 16
"""Of a trainable parameter, beside itself and its gradient: two moments, the engine's own copies of both, float32 each."""
BUCKET = 50_000_000
"""Elements that configs/deepspeed exchanges at once; without ZeRO a step's gradients, which are fewer for an adapter."""
SPARE = 1 / 32
"""Share of a GPU's memory that is kept free: packs of other lengths cut what is cached into other pieces."""


@dataclass(frozen=True)
class Found:
    """What one rank found."""

    size: int
    """Packs that fit; 1 also where not even that was tried."""
    refused: int | None = None
    """Packs that did not."""


def settled(recipe: Recipe, runtime: Runtime, model: Any, say: Callable[[str], None]) -> Recipe:
    """The recipe with a number for `auto`, the same on every rank: the smallest that any of them found. A collective.

    The global batch stays what it is. Comes back with the recipe as it is where that has a number.
    """
    if recipe.train.micro_batch_size != "auto":
        return recipe
    most = -(-recipe.train.global_batch_size // runtime.world_size)
    own = largest(most, _Trial(recipe, runtime.device, model).fits) if refuses_in_time(runtime.device) else Found(1)
    found = runtime.gather(own)
    size = min(one.size for one in found)
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"micro_batch_size": size})})
    runtime.settle(recipe)
    say(told(found, most, recipe.data.max_length, is_tried=refuses_in_time(runtime.device)))
    return recipe


def sizes(most: int) -> Iterator[int]:
    """What is tried, in this order: 2, 4, 8 and so on, and at last `most`. A single pack is what every run begins with."""
    size = 2
    while size < most:
        yield size
        size *= 2
    if most > 1:
        yield most


def largest(most: int, fits: Callable[[int], bool]) -> Found:
    """The last of `sizes` before one that does not fit."""
    found = 1
    for size in sizes(most):
        if not fits(size):
            return Found(found, refused=size)
        found = size
    return Found(found)


def told(found: Sequence[Found], most: int, max_length: int, *, is_tried: bool) -> str:
    """What was tried and found, in one line."""
    name, least = "train.micro_batch_size=auto", min(found, key=lambda one: one.size)
    if not is_tried:
        return f"{name}: 1, since on a CPU memory cannot be refused in time"
    if most == 1:
        return f"{name}: 1, each GPU has a single pack of a step"
    rank = f" on rank {found.index(least)}" if len({one.size for one in found}) > 1 else ""
    why = f"{least.refused} do not fit{rank}" if least.refused else "as many as one GPU has in a step"
    return f"{name}: {least.size}, tried with full packs of {max_length:,} tokens; {why}"


def fullest(packs: int, max_length: int) -> Batch:
    """The micro-batch that takes most memory: full packs, each token but the first of an example a target.

    Each pack holds two examples, so that the attention needs a mask of its own, as it does in training.
    """
    halves = [max(2, max_length - max_length // 2), max(2, max_length // 2)]
    examples = [Encoded(np.zeros(length, np.int32), np.arange(1, length)) for length in halves]
    return Batch(**collate(examples * packs), ids=())


class _Trial:
    """Forward and backward of the fullest micro-batches, with the memory that a step needs beside them."""

    def __init__(self, recipe: Recipe, device: torch.device, model: Any) -> None:
        self._recipe, self._device, self._model = recipe, device, model
        if any(parameter.device.type != device.type for parameter in model.parameters()):
            model.to(device)  # a base that is not quantized; it would go there a moment later
        self._trainable = list(adapter_parameters(model).values())
        spare = SPARE * torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
        elements = sum(parameter.numel() for parameter in self._trainable)
        self._reserve = STATE_BYTES * elements + 4 * min(elements, BUCKET) + int(spare)

    def fits(self, packs: int) -> bool:
        try:
            return self._pass(packs)
        finally:
            forget(self._device)

    def _pass(self, packs: int) -> bool:
        try:
            reserved = torch.empty(self._reserve, dtype=torch.uint8, device=self._device)
            batch = fullest(packs, self._recipe.data.max_length).to(self._device)
            loss = summed_loss(self._model, batch, self._recipe.train.label_smoothing_factor)
            torch.autograd.grad(loss, self._trainable, allow_unused=True)
            del reserved  # held until here
            return True
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return False
