"""The state of AdamW by parameter name, where nothing is sharded; tests/dist has the ZeRO stages."""

from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mistral_dist.config import Optim
from mistral_dist.optim import build_optimizer
from mistral_dist.runtime.engine import Runtime
from mistral_dist.runtime.shards import MOMENTS, create_state


def test_moments_may_be_gathered_before_the_first_update() -> None:
    """A run may be asked to stop before it, or its first step is not finite."""
    model = torch.nn.Linear(3, 2)
    runtime: Any = Runtime.__new__(Runtime)
    runtime.rank, runtime.deepspeed = 0, {}
    runtime._accelerator = SimpleNamespace(
        prepare_model=lambda model, evaluation_mode: model,
        prepare_optimizer=lambda optimizer: SimpleNamespace(optimizer=optimizer),
        unwrap_model=lambda model: model,
    )
    runtime.prepare(model, build_optimizer(list(model.parameters()), Optim(), fused=False))
    moments = runtime.gather_moments()
    assert moments.keys() == {f"{name}.{moment}" for name in ("weight", "bias") for moment in MOMENTS}
    assert all(not moment.any() for moment in moments.values())


@pytest.mark.parametrize("fused", [True, False])
def test_updates_from_the_state_that_is_made_are_those_of_adamw_itself(fused: bool) -> None:
    made = torch.nn.Parameter(torch.linspace(-1, 1, 12).reshape(3, 4))
    itself = deepcopy(made)
    optimizers = [build_optimizer([parameter], Optim(weight_decay=0.1), fused=fused) for parameter in (made, itself)]
    create_state(optimizers[0], 0)
    for step in range(3):
        for parameter, optimizer in zip((made, itself), optimizers, strict=True):
            parameter.grad = torch.sin(parameter.detach() * 7 + step)
            optimizer.step()
    assert torch.equal(made, itself)
    states = [optimizer.state[parameter] for parameter, optimizer in zip((made, itself), optimizers, strict=True)]
    assert states[0].keys() == states[1].keys()
    for name, value in states[1].items():
        assert torch.equal(states[0][name], value) and states[0][name].dtype == value.dtype, name
