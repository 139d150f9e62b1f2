"""The 4-bit linear layer, without a hold on its weight between forward and backward.

bitsandbytes keeps the packed weight itself for the backward pass. Under ZeRO-3 that is the whole weight, gathered for the
forward: it is freed nowhere, since someone still holds it, and a 7B that was sharded is whole again on every rank by the end of
its forward (measured: 6 GB a rank). Here the backward asks the layer, whose weight DeepSpeed has gathered again by then.
"""

from typing import Any

import torch

from mistral_dist.uncompiled import bnb


class Linear4bit(bnb.nn.Linear4bit):
    """bitsandbytes' layer, to the bit."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x`: [..., in_features]; [..., out_features] of the same dtype."""
        if torch.is_grad_enabled() and x.requires_grad:
            return _Product.apply(x, self)
        return super().forward(x)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: Linear4bit) -> torch.Tensor:
        ctx.layer, ctx.dtype = layer, x.dtype
        return bnb.nn.Linear4bit.forward(layer, x)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        packed: Any = ctx.layer.weight
        gradient = gradients[0].to(ctx.layer.compute_dtype or ctx.dtype)
        weight = bnb.functional.dequantize_4bit(packed.data.view(-1, 1), packed.quant_state).to(gradient.dtype)
        return (gradient @ weight).to(ctx.dtype), None


def let_go_of_weights(base: torch.nn.Module) -> None:
    """Make every 4-bit layer of a base one of these, in place."""
    for module in base.modules():
        if type(module) is bnb.nn.Linear4bit:
            module.__class__ = Linear4bit
