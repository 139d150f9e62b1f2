"""Whether attention stays within an example: on the live model, with the very packs that it is trained on."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from mistral_dist.data.encode import Encoded
from mistral_dist.data.stream import Batch, collate
from mistral_dist.debug.findings import Finding
from mistral_dist.loss import summed_loss

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.3}
"""Nats per target, for losses up to 5; for a larger one its share. The same tokens in a row of another length are added up in another
order, which rounds differently: float32 keeps 24 bits, bfloat16 8, so that a logit of 16 is known in steps of 0.06, after each layer.
Measured in bfloat16: 0.02 with 3 layers, 0.12 with 30."""


def borders(model: Any, examples: Sequence[Encoded], device: torch.device, dtype: torch.dtype) -> Finding:
    """Loss of a packed row = the losses of its examples alone; and the last one's stays, to the bit, whatever stands before it.

    `examples`: two or more, of one row. The second look is the sharper one: in rows of one shape every sum is made in the same order.
    """
    what, counts = "pack borders", [len(example.ids) for example in examples]
    lengths = f"{len(examples)} examples, {min(counts)} to {max(counts)} tokens long,"
    last, tolerance = examples[-1], TOLERANCE[dtype]
    with still(model):
        packed = _losses(model, examples, device)
        alone = torch.cat([_losses(model, [example], device) for example in examples])
        turned = [Encoded(example.ids[::-1].copy(), example.targets) for example in examples[:-1]]
        exchanged = _losses(model, [*turned, last], device)
    sizes = [len(example.targets) for example in examples]
    means = [(float(a.mean()), float(b.mean())) for a, b in zip(packed.split(sizes), alone.split(sizes), strict=True)]
    worst, number = max((abs(a - b) / max(1.0, b / 5), n) for n, (a, b) in enumerate(means))
    if not worst <= tolerance:
        one = f"example {number + 1} of {len(means)} has a loss of {means[number][0]:.4f} in its pack and {means[number][1]:.4f} alone"
        why = f"more than rounding explains ({tolerance:g}): attention crosses from one example to the next"
        return Finding(what, False, f"{one}, {why}")
    told = f"{lengths} packed and alone: losses within {worst:.1e} nats per target (rounding explains {tolerance:g})"
    seen = float((packed[-sizes[-1] :] - exchanged[-sizes[-1] :]).abs().max())
    allowed = 0.0 if device.type == "cpu" else tolerance / 10
    if not seen <= allowed:
        why = f"other tokens before the last example change its loss by {seen:.1e}"
        return Finding(what, False, f"{why}, {allowed:g} is allowed: attention crosses from one example to the next")
    return Finding(what, True, f"{told}; other tokens in front change {'not a bit' if seen == 0 else f'{seen:.0e}'} of the last one's")


def pairable(rows: Sequence[Sequence[Encoded]], capacity: int) -> list[Encoded]:
    """Two or more examples that fit into one row: those of the first pack that has so many, else the ends of two examples."""
    for examples in rows:
        if len(examples) > 1:
            return list(examples)
    alone = [example for examples in rows for example in examples]
    return [tail(example, max(2, capacity // 2)) for example in (alone * 2)[:2]]


def tail(example: Encoded, tokens: int) -> Encoded:
    """The last tokens of an example, where its last target is."""
    start = max(0, len(example.ids) - tokens)
    return Encoded(example.ids[start:], example.targets[example.targets > start] - start, example.weight)


@contextmanager
def still(model: torch.nn.Module) -> Iterator[None]:
    """The model as it is trained, but without dropout."""
    noisy = [module for module in model.modules() if isinstance(module, torch.nn.Dropout) and module.training]
    for module in noisy:
        module.eval()
    try:
        yield
    finally:
        for module in noisy:
            module.train()


@torch.no_grad()
def mean_loss(model: Any, batches: Sequence[Batch], device: torch.device) -> float:
    """Nats per target of some micro-batches, each target weighted as in training, without dropout and smoothing."""
    with still(model):
        total = sum(float(summed_loss(model, batch.to(device))) for batch in batches)
    return total / sum(float(batch.weights.sum()) for batch in batches)


@torch.no_grad()
def _losses(model: Any, examples: Sequence[Encoded], device: torch.device) -> torch.Tensor:
    """float32 [N] on the CPU: the loss of each target, in nats."""
    batch = Batch(**collate(examples), ids=()).to(device)
    return torch.nn.functional.cross_entropy(logits_of(model, batch), batch.targets, reduction="none").cpu()


@torch.no_grad()
def logits_of(model: Any, batch: Batch) -> torch.Tensor:
    """float32 [N, vocabulary] at the positions that predict a target, as in training."""
    given = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "logits_to_keep": batch.predict_from}
    return model(**given, use_cache=False).logits[0].float()
