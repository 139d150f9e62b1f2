"""One run, any machines: the same recipe under one process, data parallelism, ZeRO-1, 2 and 3, on one, two and three ranks.

Real processes on gloo, the real engine, a real pretrained model (its lower layers) in NF4.
"""

from collections.abc import Callable, Container, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mistral_dist.config import Recipe
from mistral_dist.data.prepared import Prepared, read_manifest
from tests.conftest import WriteRecipe
from tests.launch import lines, losses, mistral_dist, train

STEPS = 50
TOPOLOGIES: dict[str, tuple[int, int | str]] = {"data parallel x 2": (2, 0), "ZeRO-1 x 2": (2, 1), "ZeRO-2 x 2": (2, 2)}
TOPOLOGIES |= {"ZeRO-3 x 2": (2, 3), "ZeRO-3 x 3": (3, 3)}
OFFLOAD: dict[str, tuple[int, int | str]] = {"ZeRO-2 x 2 with offload": (2, "2+offload"), "ZeRO-3 x 2 with offload": (2, "3+offload")}
IN_EVERY_RUN = ("ZeRO-2 x 2", "ZeRO-3 x 2")
"""The others are left to `make faults`."""


def each_of(topologies: Iterable[str], ours: Container[str] = IN_EVERY_RUN) -> list[Any]:
    return [name if name in ours else pytest.param(name, marks=pytest.mark.matrix) for name in topologies]


@pytest.fixture(scope="module")
def recipe(recipe_writer: Callable[[Path], WriteRecipe], tmp_path_factory: pytest.TempPathFactory) -> Path:
    train = {"epochs": 4, "steps": STEPS, "global_batch_size": 4, "gradient_checkpointing": False}
    recipe = recipe_writer(tmp_path_factory.mktemp("topologies"))(train=train)
    assert mistral_dist("prepare", recipe).returncode == 0
    return recipe


@pytest.fixture(scope="module")
def alone(recipe: Path) -> Path:
    """One process, float32."""
    run = train(recipe, recipe.parent / "alone", processes=1, zero=0)
    assert len(losses(run)) == STEPS
    assert losses(run)[-1] < losses(run)[0]
    each_example_once_an_epoch([id for entry in lines(run / "data_order.jsonl") for id in entry["ids"]], Recipe.load(recipe))
    return run


@pytest.mark.parametrize("name", each_of(TOPOLOGIES | OFFLOAD))
def test_float32_losses_and_order_are_those_of_one_process(name: str, recipe: Path, alone: Path, tmp_path: Path) -> None:
    processes, zero = (TOPOLOGIES | OFFLOAD)[name]
    run = train(recipe, tmp_path / "run", processes=processes, zero=zero)
    assert lines(run / "data_order.jsonl") == lines(alone / "data_order.jsonl")
    worst = max(abs(a - b) for a, b in zip(losses(run), losses(alone), strict=True))
    print(f"{name}: float32 losses within {worst:.1e} of one process at each of {STEPS} steps")
    assert worst <= 1e-4


def each_example_once_an_epoch(ids: list[str], recipe: Recipe, at_least: int = 2) -> None:
    """In each whole epoch that these ids are."""
    manifest = read_manifest(recipe.data_dir)
    assert manifest is not None
    train = sorted(Prepared(recipe.data_dir, manifest).split("train")["id"])
    epochs = len(ids) // len(train)
    assert epochs >= at_least
    for epoch in range(epochs):
        assert sorted(ids[epoch * len(train) : (epoch + 1) * len(train)]) == train


BFLOAT16 = ("model.dtype=bfloat16", f"train.steps={STEPS // 2}")


@pytest.fixture(scope="module")
def alone_in_bfloat16(recipe: Path) -> Path:
    return train(recipe, recipe.parent / "alone-in-bfloat16", *BFLOAT16, processes=1, zero=0)


@pytest.mark.parametrize("name", each_of(TOPOLOGIES, ours=IN_EVERY_RUN[:1]))
def test_bfloat16_losses_are_those_of_one_process(name: str, recipe: Path, alone_in_bfloat16: Path, tmp_path: Path) -> None:
    alone, (processes, zero) = alone_in_bfloat16, TOPOLOGIES[name]
    run = train(recipe, tmp_path / "run", *BFLOAT16, processes=processes, zero=zero)
    assert lines(run / "data_order.jsonl") == lines(alone / "data_order.jsonl")
    first = abs(losses(run)[0] - losses(alone)[0])
    mean = abs(sum(losses(run)) / sum(losses(alone)) - 1)
    print(f"{name}: bfloat16 first loss within {first:.1e}, mean loss within {mean:.2%} of one process")
    assert first <= 1e-3
    assert mean <= 0.02


@pytest.mark.matrix
def test_gradients_agree_however_a_global_batch_is_cut(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    """Promise 1, through the real engine: 1 rank x 8 packs, 1 x 2 x 4 accumulations, 2 ranks x 2 x 2.

    After the first step AdamW's first moment is (1 - beta1) x gradient, so a checkpoint of it holds the gradient that
    the engine made, whatever the engine was.
    """
    recipe = write_recipe(
        train={"steps": 1, "global_batch_size": 8, "gradient_checkpointing": False}, optim={"max_grad_norm": 1e9, "learning_rate": 1e-3}
    )
    assert mistral_dist("prepare", recipe).returncode == 0
    cuts: dict[str, tuple[int, int | str, int]] = {"1 x 8": (1, 0, 8), "1 x 2 x 4": (1, 0, 2), "2 x 2 x 2": (2, 0, 2)}
    cuts |= {f"{cut}, ZeRO-{zero}": (ranks, zero, 2) for zero in (2, 3) for cut, ranks in (("1 x 2 x 4", 1), ("2 x 2 x 2", 2))}
    cuts |= {f"2 x 2 x 2, ZeRO-{zero}+offload": (2, f"{zero}+offload", 2) for zero in (2, 3)}
    gradients = {}
    for name, (processes, stage, micro) in cuts.items():
        run = train(recipe, tmp_path / name.replace(" ", ""), f"train.micro_batch_size={micro}", processes=processes, zero=stage)
        moments = load_file(run / "checkpoints" / "checkpoint-1" / "optimizer.safetensors")
        gradients[name] = {key: value / 0.1 for key, value in moments.items() if key.endswith("exp_avg")}
        assert lines(run / "metrics.jsonl")[0]["trained_tokens"] % 8, "the targets should be ragged"
    for name in ("2 x 2 x 2, ZeRO-2", "2 x 2 x 2, ZeRO-3"):
        for key, gradient in gradients[name].items():
            assert torch.equal(gradients[f"{name}+offload"][key], gradient), (
                f"{name}: with offload the same to the bit, where nothing is clipped"
            )
    wanted = gradients.pop("1 x 8")
    assert len(wanted) == 2 * 7 * 3
    for name, found in gradients.items():
        worst = max(float((found[key] - gradient).norm() / gradient.norm()) for key, gradient in wanted.items())
        print(f"{name}: relative error of each parameter's gradient at most {worst:.1e}")
        assert worst <= 1e-5, name
