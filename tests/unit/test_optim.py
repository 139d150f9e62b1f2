"""The learning rate's course, and what the optimizer is given."""

import pytest
import torch

from mistral_dist.config import Optim
from mistral_dist.optim import build_optimizer, lr_at

STEPS = 40
COURSES = ["cosine", "linear", "constant"]


def rates(steps: int = STEPS, **fields: object) -> list[float]:
    optim = Optim.model_validate({"learning_rate": 1.0, "warmup_ratio": 0.1, **fields})
    return [lr_at(step, steps, optim) for step in range(steps)]


@pytest.mark.parametrize("course", COURSES)
def test_the_warm_up_rises_linearly_to_the_peak(course: str) -> None:
    assert rates(lr_scheduler_type=course)[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])


@pytest.mark.parametrize(
    ("course", "expected"),
    [
        # 36 steps after the warm-up of 4: where the way down begins, a third of it, half, the last
        ("linear", [1.0, 2 / 3, 0.5, 1 / 36]),
        ("cosine", [1.0, 0.75, 0.5, 0.5 * (1 - 0.9961946980917455)]),  # 1/2 (1 + cos 60), (1 + cos 90), (1 + cos 175 degrees)
        ("constant", [1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_the_way_down(course: str, expected: list[float]) -> None:
    found = rates(lr_scheduler_type=course)
    assert [found[4], found[16], found[22], found[39]] == pytest.approx(expected)


@pytest.mark.parametrize("course", COURSES)
@pytest.mark.parametrize("warmup", [0.0, 0.05, 0.5, 0.99])
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 100])
def test_every_step_learns_and_none_goes_above_the_peak(course: str, warmup: float, steps: int) -> None:
    found = rates(steps, lr_scheduler_type=course, warmup_ratio=warmup)
    assert all(0 < rate <= 1 for rate in found)
    assert max(found) == 1


@pytest.mark.parametrize("course", COURSES)
def test_it_rises_once_and_then_never_again(course: str) -> None:
    found = rates(lr_scheduler_type=course)
    top = found.index(max(found))
    assert found[: top + 1] == sorted(found[: top + 1])
    assert found[top:] == sorted(found[top:], reverse=True)


def test_without_a_warm_up_the_first_step_has_the_peak() -> None:
    assert rates(warmup_ratio=0.0)[0] == 1.0


def test_it_is_proportional_to_the_peak() -> None:
    assert rates(learning_rate=2e-4) == pytest.approx([2e-4 * rate for rate in rates()])


@pytest.mark.parametrize("course", COURSES)
def test_a_step_has_the_same_rate_in_any_order(course: str) -> None:
    optim = Optim(lr_scheduler_type=course)  # type: ignore[arg-type]
    forwards = [lr_at(step, STEPS, optim) for step in range(STEPS)]
    backwards = [lr_at(step, STEPS, optim) for step in reversed(range(STEPS))]
    assert forwards == backwards[::-1]


@pytest.mark.parametrize("fused", [True, False])
def test_the_optimizer_is_what_the_recipe_says(fused: bool) -> None:
    parameters = [torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(3))]
    optim = Optim(learning_rate=3e-4, weight_decay=0.1, adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-6)
    optimizer = build_optimizer(parameters, optim, fused=fused)
    assert type(optimizer) is torch.optim.AdamW
    (group,) = optimizer.param_groups
    found = {name: group[name] for name in ("lr", "weight_decay", "betas", "eps", "fused")}
    assert found == {"lr": 3e-4, "weight_decay": 0.1, "betas": (0.8, 0.95), "eps": 1e-6, "fused": fused}
    assert [id(parameter) for parameter in group["params"]] == [id(parameter) for parameter in parameters]


def test_weight_decay_is_decoupled_from_the_gradient() -> None:
    parameter = torch.nn.Parameter(torch.tensor([2.0]))
    optimizer = build_optimizer([parameter], Optim(learning_rate=0.1, weight_decay=0.5), fused=False)
    parameter.grad = torch.zeros(1)
    optimizer.step()
    assert parameter.item() == pytest.approx(2.0 * (1 - 0.1 * 0.5))
