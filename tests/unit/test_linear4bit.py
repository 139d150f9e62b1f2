"""The 4-bit layer: the library's numbers, and no hold on the weight."""

import gc
import weakref

import bitsandbytes as bnb
import pytest
import torch

from mistral_dist.linear4bit import Linear4bit, let_go_of_weights


def quantized(dtype: torch.dtype) -> torch.nn.Sequential:
    """One layer of 192 x 128 in NF4, its input not the dtype that it computes in where that is bfloat16."""
    generator = torch.Generator().manual_seed(0)
    layer = bnb.nn.Linear4bit(128, 192, bias=False, compute_dtype=dtype, quant_type="nf4", quant_storage=dtype)
    layer.weight = bnb.nn.Params4bit(
        torch.randn(192, 128, generator=generator), requires_grad=False, quant_type="nf4", quant_storage=dtype, module=layer
    )
    return torch.nn.Sequential(layer.to("cpu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("input_dtype", [torch.float32, torch.bfloat16])
def test_output_and_gradient_are_the_librarys_to_the_bit(dtype: torch.dtype, input_dtype: torch.dtype) -> None:
    found = []
    for ours in (False, True):
        model = quantized(dtype)
        if ours:
            let_go_of_weights(model)
        assert isinstance(model[0], Linear4bit) == ours
        x = torch.randn(2, 7, 128, generator=torch.Generator().manual_seed(1)).to(input_dtype).requires_grad_()
        out = model(x)
        out.square().sum().backward()
        found.append((out.detach(), x.grad))
        with torch.no_grad():
            assert torch.equal(model(x), out)
    (out, gradient), (same_out, same_gradient) = found
    assert out.dtype == same_out.dtype == input_dtype
    assert torch.equal(out, same_out)
    assert torch.equal(gradient, same_gradient)
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize("ours", [True, False])
def test_nothing_holds_the_weight_between_forward_and_backward(ours: bool) -> None:
    """What ZeRO-3 does: the weight is gathered for the forward, freed, and gathered again for the backward, elsewhere."""
    model = quantized(torch.float32)
    if ours:
        let_go_of_weights(model)
    weight, kept = model[0].weight, model[0].weight.data.clone()
    gathered = kept.numpy().copy()
    is_there = weakref.ref(gathered)
    weight.data = torch.from_numpy(gathered)
    x = torch.randn(3, 128, requires_grad=True)
    out = model(x)
    weight.data = torch.empty(0)
    del gathered
    gc.collect()
    assert (is_there() is None) == ours, "the library holds it: where it no longer does, ours is not needed"
    weight.data = kept
    out.sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0
