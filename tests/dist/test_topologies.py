"""One run, any machines: the same recipe under one process, data parallelism, ZeRO-1, 2 and 3, on one, two and three ranks.

Real processes on gloo, the real engine, a real pretrained model (its lower layers) in NF4.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file

from mistral_dist.config import Recipe
from mistral_dist.data.prepared import Prepared, read_manifest
from tests.conftest import WriteRecipe
from tests.launch import lines, losses, mistral_dist, train

STEPS = 50
Topologies = dict[str, tuple[int, int | str]]
TOPOLOGIES: Topologies = {"one process": (1, 0), "data parallel x 2": (2, 0)}
TOPOLOGIES |= {"ZeRO-1 x 2": (2, 1), "ZeRO-2 x 2": (2, 2), "ZeRO-3 x 2": (2, 3), "ZeRO-3 x 3": (3, 3)}
OFFLOAD: Topologies = {"ZeRO-2 x 2 with offload": (2, "2+offload"), "ZeRO-3 x 2 with offload": (2, "3+offload")}


def all_topologies(topologies: Topologies, recipe: Path, folder: Path, *overrides: str) -> dict[str, Path]:
    assert mistral_dist("prepare", recipe).returncode == 0
    return {
        name: train(recipe, folder / name.replace(" ", "-"), *overrides, processes=processes, zero=zero)
        for name, (processes, zero) in topologies.items()
    }


def test_float32_losses_and_order_agree_under_every_topology(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    recipe = write_recipe(train={"epochs": 4, "steps": STEPS, "global_batch_size": 4, "gradient_checkpointing": False})
    runs = all_topologies(TOPOLOGIES | OFFLOAD, recipe, tmp_path / "runs")
    alone = runs["one process"]
    assert len(losses(alone)) == STEPS
    order = lines(alone / "data_order.jsonl")
    each_example_once_an_epoch([id for entry in order for id in entry["ids"]], Recipe.load(recipe))
    for name, run in runs.items():
        assert lines(run / "data_order.jsonl") == order, name
        worst = max(abs(a - b) for a, b in zip(losses(run), losses(alone), strict=True))
        print(f"{name}: float32 losses within {worst:.1e} of one process at each of {STEPS} steps")
        assert worst <= 1e-4, name
    assert losses(alone)[-1] < losses(alone)[0]


def each_example_once_an_epoch(ids: list[str], recipe: Recipe, at_least: int = 2) -> None:
    """In each whole epoch that these ids are."""
    manifest = read_manifest(recipe.data_dir)
    assert manifest is not None
    train = sorted(Prepared(recipe.data_dir, manifest).split("train")["id"])
    epochs = len(ids) // len(train)
    assert epochs >= at_least
    for epoch in range(epochs):
        assert sorted(ids[epoch * len(train) : (epoch + 1) * len(train)]) == train


def test_bfloat16_losses_agree_under_every_topology(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    recipe = write_recipe(train={"epochs": 4, "steps": STEPS // 2, "global_batch_size": 4, "gradient_checkpointing": False})
    runs = all_topologies(TOPOLOGIES, recipe, tmp_path / "runs", "model.dtype=bfloat16")
    alone = runs["one process"]
    for name, run in runs.items():
        assert lines(run / "data_order.jsonl") == lines(alone / "data_order.jsonl"), name
        first = abs(losses(run)[0] - losses(alone)[0])
        mean = abs(sum(losses(run)) / sum(losses(alone)) - 1)
        print(f"{name}: bfloat16 first loss within {first:.1e}, mean loss within {mean:.2%} of one process")
        assert first <= 1e-3, name
        assert mean <= 0.02, name


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
