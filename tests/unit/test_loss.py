"""The loss: weighted sums that do not depend on how a batch is cut, and smoothing as others compute it."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.trainer_pt_utils import LabelSmoother

from mistral_dist.loss import summed_cross_entropy

VOCABULARY = 50


def drawn(targets: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, targets, weights."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(targets, VOCABULARY, generator=generator)
    return logits, torch.randint(VOCABULARY, (targets,), generator=generator), 0.1 + 4 * torch.rand(targets, generator=generator)


def test_each_target_counts_what_it_weighs() -> None:
    logits, targets, weights = drawn(7)
    each = [summed_cross_entropy(logits[n : n + 1], targets[n : n + 1], torch.ones(1)) for n in range(7)]
    wanted = sum(float(weight) * float(one) for weight, one in zip(weights, each, strict=True))
    assert float(summed_cross_entropy(logits, targets, weights)) == pytest.approx(wanted, rel=1e-6)
    assert wanted != pytest.approx(float(sum(each)), rel=0.1)


def test_a_weighted_mean_is_that_of_pytorch() -> None:
    """Weights by class, divided by the sum of the weights: `CrossEntropyLoss(weight=...)`, mean."""
    logits, targets, _ = drawn(40)
    by_class = 0.1 + 4 * torch.rand(VOCABULARY, generator=torch.Generator().manual_seed(1))
    weights = by_class[targets]
    ours = summed_cross_entropy(logits, targets, weights) / weights.sum()
    torch.testing.assert_close(ours, torch.nn.functional.cross_entropy(logits, targets, weight=by_class), rtol=1e-6, atol=0)


@settings(max_examples=60, deadline=None)
@given(cuts=st.lists(st.integers(0, 30), max_size=6), smoothing=st.sampled_from([0.0, 0.1]))
def test_loss_and_gradient_do_not_depend_on_the_cut(cuts: list[int], smoothing: float) -> None:
    logits, targets, weights = drawn(30)
    whole = logits.clone().requires_grad_()
    loss = summed_cross_entropy(whole, targets, weights, smoothing) / weights.sum()
    loss.backward()
    pieces = logits.clone().requires_grad_()
    ends = [0, *sorted(cuts), 30]
    parts = [summed_cross_entropy(pieces[a:b], targets[a:b], weights[a:b], smoothing) / weights.sum() for a, b in pairwise(ends)]
    for part in parts:
        part.backward()
    torch.testing.assert_close(torch.stack(parts).sum(), loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(pieces.grad, whole.grad, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("smoothing", [0.01, 0.1, 0.5])
def test_smoothing_is_that_of_trainer(smoothing: float) -> None:
    logits, targets, _ = drawn(40)
    theirs = LabelSmoother(epsilon=smoothing)({"logits": logits[None]}, targets[None])
    ours = summed_cross_entropy(logits, targets, torch.ones(40), smoothing) / 40
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    plain = summed_cross_entropy(logits, targets, torch.ones(40)) / 40
    assert abs(float(ours - plain)) > 1e-4


def test_without_smoothing_not_a_bit_is_another() -> None:
    logits, targets, weights = drawn(40)
    plain = (torch.nn.functional.cross_entropy(logits, targets, reduction="none") * weights).sum()
    assert torch.equal(summed_cross_entropy(logits, targets, weights, 0.0), plain)
