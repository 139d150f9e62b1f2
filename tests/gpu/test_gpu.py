"""What only an NVIDIA GPU can show. Skipped, with the reason, where there is none; unproven until it ran.

make test-gpu        some minutes on one card; figures go to the output (-s)
"""

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from mistral_dist.config import Recipe
from mistral_dist.data.encode import Encoded
from mistral_dist.data.stream import Batch, collate
from mistral_dist.loss import summed_loss
from mistral_dist.model import adapter_parameters, build_trainable, choose_attention
from tests.conftest import WriteRecipe
from tests.launch import losses, metrics, mistral_dist, train, training, wait_for, workers

pytestmark = pytest.mark.gpu


def example(length: int, seed: int) -> Encoded:
    ids = torch.randint(100, 40_000, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return Encoded(ids, list(range(length // 2, length)))


def loss_and_gradients(model: Any, *examples: Encoded) -> tuple[float, torch.Tensor]:
    model.zero_grad()
    loss = summed_loss(model, Batch(**collate(examples), ids=()).to(torch.device("cuda")))
    loss.backward()
    return float(loss), torch.cat([parameter.grad.flatten() for parameter in adapter_parameters(model).values()])


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flash_attention_2"])
def test_packing_is_invisible(write_recipe: WriteRecipe, attention: str) -> None:
    """In bfloat16 to its rounding: a row's loss is the sum of its examples' losses."""
    if attention == "flash_attention_2":
        pytest.importorskip("flash_attn", reason="flash-attn is not installed")
    recipe = Recipe.load(write_recipe(), ["model.dtype=bfloat16"])
    model = build_trainable(recipe, torch.device("cuda"), attention).cuda()
    examples = [example(length, length) for length in (33, 257, 90)]
    alone = [loss_and_gradients(model, one) for one in examples]
    packed, gradient = loss_and_gradients(model, *examples)
    assert packed == pytest.approx(sum(loss for loss, _ in alone), rel=5e-3)
    together = sum(gradient for _, gradient in alone)
    assert float((gradient - together).norm() / together.norm()) < 5e-2


def test_attention_auto_takes_flash_attention_where_it_is(write_recipe: WriteRecipe) -> None:
    pytest.importorskip("flash_attn", reason="flash-attn is not installed")
    model = Recipe.load(write_recipe(), ["model.dtype=bfloat16"]).model
    assert choose_attention(model, torch.device("cuda")) == "flash_attention_2"


@pytest.mark.parametrize("zero", [1, 2, 3, "2+offload", "3+offload"])
def test_zero_on_one_card_learns_what_no_zero_learns(write_recipe: WriteRecipe, tmp_path: Path, zero: int | str) -> None:
    recipe = write_recipe(train={"steps": 20, "global_batch_size": 4})
    assert mistral_dist("prepare", recipe).returncode == 0
    alone = losses(train(recipe, tmp_path / "alone", processes=1, zero=0))
    shared = losses(train(recipe, tmp_path / "shared", processes=1, zero=zero))
    assert max(abs(a - b) for a, b in zip(alone, shared, strict=True)) < 1e-3


def test_a_killed_deterministic_run_ends_with_the_same_bits(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    recipe = write_recipe(model={"dtype": "bfloat16"}, train={"steps": 20, "global_batch_size": 4, "deterministic": True})
    assert mistral_dist("prepare", recipe).returncode == 0
    wanted, run = train(recipe, tmp_path / "straight", processes=1, zero=2), tmp_path / "killed"
    with training(recipe, run, until=8, processes=1, zero=2) as started:
        started.kill()
    wait_for(lambda: not workers(run))
    train(recipe, run, processes=1, zero=2)
    assert metrics(run) == metrics(wanted)
    file = "adapter/adapter_model.safetensors"
    assert (run / file).read_bytes() == (wanted / file).read_bytes()


def test_speed_and_memory_are_reported(write_recipe: WriteRecipe) -> None:
    """No bound, since cards differ: the figures of the full small model on long packs, for the record."""
    recipe = Recipe.load(write_recipe(), ["model.dtype=bfloat16", "data.max_length=2048"])
    model = build_trainable(recipe, torch.device("cuda"), choose_attention(recipe.model, torch.device("cuda"))).cuda()
    row = [example(length, length) for length in (1024, 700, 300)]
    loss_and_gradients(model, *row)
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.synchronize()
    started = time.monotonic()
    for _ in range(10):
        loss_and_gradients(model, *row)
    torch.cuda.synchronize()
    speed = 10 * sum(len(one.ids) for one in row) / (time.monotonic() - started)
    peak = torch.cuda.max_memory_allocated()
    print(f"\n{torch.cuda.get_device_name()}: {speed:,.0f} tokens/s, peak {peak / 2**30:.2f} GiB (3 layers of 135M)")
    assert peak > 0
