"""Hidden states at the targets -> summed cross-entropy.

Only the positions that predict a target go through the output head: on chat data some 70 % of the tokens are prompt,
and their logits (32,768 floats each) would cost more memory than the whole adapter.
"""

from typing import Any

import torch

from mistral_dist.data.stream import Batch


def summed_loss(model: Any, batch: Batch, label_smoothing: float = 0.0) -> torch.Tensor:
    """Sum over the batch's targets of weight x cross-entropy, in nats; a float32 scalar with gradient."""
    output = model(input_ids=batch.input_ids, position_ids=batch.position_ids, logits_to_keep=batch.predict_from, use_cache=False)
    return summed_cross_entropy(output.logits[0], batch.targets, batch.weights, label_smoothing)


def refusing_infinity(loss: torch.Tensor) -> torch.Tensor:
    """The same loss; but one that is not finite gives a gradient that is not, which no update survives on any rank.

    An infinite loss may have a finite gradient: softmax minus one. No value is read, so a GPU need not be waited for.
    """
    return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)


def summed_cross_entropy(logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
    """`logits` float [N, vocabulary], `targets` int64 [N], `weights` float32 [N] -> float32 scalar.

    With smoothing s a target's probability is 1 - s, and s is spread evenly over the whole vocabulary, itself included.
    """
    each = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none", label_smoothing=label_smoothing)
    return (each * weights).sum()
