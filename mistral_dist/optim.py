"""The optimizer, and the learning rate as a pure function of the step."""

import math

import torch

from mistral_dist.config import Optim


def build_optimizer(parameters: list[torch.nn.Parameter], optim: Optim, *, fused: bool) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101) over the adapter, one parameter group: LoRA has no biases or norms to spare from decay."""
    return torch.optim.AdamW(
        parameters,
        lr=optim.learning_rate,
        betas=(optim.adam_beta1, optim.adam_beta2),
        eps=optim.adam_epsilon,
        weight_decay=optim.weight_decay,
        fused=fused,
    )


def lr_at(step: int, steps: int, optim: Optim) -> float:
    """The learning rate of a step (from 0) of a run of `steps`.

    Linear from above 0 to the peak over the warm-up, then cosine or linear so that the last step is the last above 0.
    """
    warmup = math.ceil(optim.warmup_ratio * steps)
    if step < warmup:
        return optim.learning_rate * (step + 1) / warmup
    if optim.lr_scheduler_type == "constant":
        return optim.learning_rate
    left = 1.0 - (step - warmup) / max(1, steps - warmup)
    return optim.learning_rate * (left if optim.lr_scheduler_type == "linear" else 0.5 * (1.0 - math.cos(math.pi * left)))
