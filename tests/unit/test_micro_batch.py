"""The search behind `train.micro_batch_size: auto`."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mistral_dist.config import Recipe
from mistral_dist.data.stream import Plan, Stream
from mistral_dist.errors import RecipeError
from mistral_dist.loss import summed_loss
from mistral_dist.micro_batch import Found, fullest, largest, sizes, told
from mistral_dist.model import adapter_parameters, build_trainable
from mistral_dist.runtime.zero import accumulation_steps, resolve_deepspeed
from tests.conftest import WriteRecipe
from tests.unit.test_runtime import ZERO2, recipe
from tests.unit.test_stream import Numbered


@pytest.mark.parametrize(
    ("most", "tried"), [(1, []), (2, [2]), (3, [2, 3]), (4, [2, 4]), (6, [2, 4, 6]), (8, [2, 4, 8]), (32, [2, 4, 8, 16, 32])]
)
def test_sizes_double_up_to_what_one_gpu_has_of_a_step(most: int, tried: list[int]) -> None:
    assert list(sizes(most)) == tried


@pytest.mark.parametrize(
    ("most", "room", "found"),
    [(8, 100, Found(8)), (8, 7, Found(4, refused=8)), (6, 5, Found(4, refused=6)), (8, 0, Found(1, refused=2)), (1, 0, Found(1))],
)
def test_nothing_is_tried_after_what_does_not_fit(most: int, room: int, found: Found) -> None:
    asked: list[int] = []

    def fits(packs: int) -> bool:
        asked.append(packs)
        return packs <= room

    assert largest(most, fits) == found
    assert asked == [size for size in sizes(most) if size <= (found.refused or most)]


def test_what_was_tried_and_found_is_told() -> None:
    lines = {
        told([Found(4, refused=8)], 8, 2048, is_tried=True): "4, tried with full packs of 2,048 tokens; 8 do not fit",
        told([Found(8), Found(2, refused=4)], 8, 512, is_tried=True): "2, tried with full packs of 512 tokens; 4 do not fit on rank 1",
        told([Found(8), Found(8)], 8, 512, is_tried=True): "8, tried with full packs of 512 tokens; as many as one GPU has in a step",
        told([Found(1)], 1, 512, is_tried=True): "1, each GPU has a single pack of a step",
        told([Found(1)], 8, 512, is_tried=False): "1, since on a CPU memory cannot be refused in time",
    }
    for line, end in lines.items():
        assert line == f"train.micro_batch_size=auto: {end}"


@pytest.mark.parametrize("max_length", [4, 33, 2048])
def test_the_fullest_micro_batch_is_full_of_targets(max_length: int) -> None:
    batch = fullest(3, max_length)
    assert batch.input_ids.shape == (1, 3 * max_length)
    assert int((batch.position_ids == 0).sum()) == 6
    assert len(batch.targets) == 3 * max_length - 6


@pytest.mark.parametrize("checkpointing", [True, False])
def test_a_trial_leaves_the_model_as_it_was(checkpointing: bool, write_recipe: WriteRecipe) -> None:
    """No gradient, no hook, no bit: what each trial does, on a real model."""
    small = Recipe.load(write_recipe(train={"gradient_checkpointing": checkpointing}))
    model = build_trainable(small, torch.device("cpu"), "sdpa")
    trainable = adapter_parameters(model)

    def state() -> dict[str, bytes]:
        """Bytes, since those of packed weights are no numbers."""
        tensors = {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, torch.Tensor)}
        return {name: tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for name, tensor in tensors.items()}

    before = state()
    hooked: list[str] = []
    for name, parameter in trainable.items():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: hooked.append(name))  # type: ignore[misc]
    found = torch.autograd.grad(summed_loss(model, fullest(2, 32)), list(trainable.values()), allow_unused=True)
    assert all(gradient is not None and gradient.any() for gradient in found)
    assert hooked == [] and all(parameter.grad is None for parameter in trainable.values())
    assert state() == before


def test_a_stream_is_regrouped() -> None:
    lengths = torch.full((24,), 8).numpy()

    def stream(micro: int) -> Stream:
        plan = Plan(lengths, capacity=8, seed=0, epochs=1, global_batch_size=6)
        return Stream(plan, Numbered(lengths), (lengths, lengths - 1), rank=1, world_size=2, micro_batch_size=micro)

    regrouped = stream(1)
    regrouped.regroup(2)
    assert [batch.ids for batch in regrouped.work(0).batches] == [batch.ids for batch in stream(2).work(0).batches]
    assert [batch.ids for batch in regrouped.work(0).batches] != [batch.ids for batch in stream(1).work(0).batches]


def test_until_auto_has_found_a_number_it_is_one() -> None:
    auto = recipe(global_batch_size=8, micro_batch_size="auto")  # type: ignore[arg-type]
    assert accumulation_steps(auto, 2) == 4
    assert resolve_deepspeed(ZERO2, auto, 2)["train_micro_batch_size_per_gpu"] == 1


@pytest.mark.parametrize("value", ["0", "many", "1.5", "true", "null"])
def test_what_is_neither_auto_nor_a_count_is_refused(value: str, write_recipe: Callable[..., Path]) -> None:
    with pytest.raises(RecipeError, match=r"override: train\.micro_batch_size: must be auto or a whole number from 1 on, but it is "):
        Recipe.load(write_recipe(), [f"train.micro_batch_size={value}"])
