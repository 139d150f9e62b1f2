"""What only NVIDIA GPUs can show: on one card, and a little on two. Skipped, with the reason, where there are none; unproven until it ran.

    make test-gpu        some twenty launches and a few small models, four groups side by side, then the speeds alone: some 10 minutes

Memory and tokens/s go to build/gpu/figures.json, which is named at the end. Not here: two ranks on one card. NCCL refuses a
card twice, and gloo has neither the reduce-scatter nor the all-gather of GPU tensors that ZeRO needs.
"""

import functools
import re
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch

from mistral_dist import base
from mistral_dist.base import compute_dtype, load_base
from mistral_dist.config import Recipe
from mistral_dist.data.encode import Encoded
from mistral_dist.data.stream import Batch, collate
from mistral_dist.errors import MachineError
from mistral_dist.loss import summed_loss
from mistral_dist.model import adapter_parameters, build_trainable, choose_attention
from tests import faults
from tests.conftest import WriteRecipe
from tests.dist.test_leaving import assert_stopped, workers_of
from tests.launch import lines, losses, metrics, mistral_dist, resume, run_dir, status, train, training, wait_for, workers
from tests.unit.test_base import assert_same, from_pretrained

pytestmark = pytest.mark.gpu

GIB = 2**30
CARD = torch.device("cuda")
Figures = dict[str, Any]


def available(attention: str) -> str:
    if attention == "flash_attention_2":
        pytest.importorskip("flash_attn", reason="flash-attn is not installed")
    return attention


def example(length: int, seed: int) -> Encoded:
    ids = torch.randint(100, 40_000, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return Encoded(ids, list(range(length // 2, length)))


def batch_of(*examples: Encoded) -> Batch:
    return Batch(**collate(examples), ids=()).to(CARD)


def loss_and_gradients(model: Any, batch: Batch) -> tuple[float, torch.Tensor]:
    model.zero_grad()
    loss = summed_loss(model, batch)
    loss.backward()
    return float(loss.detach()), torch.cat([parameter.grad.flatten() for parameter in adapter_parameters(model).values()])


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flash_attention_2"])
def test_packing_is_invisible(write_recipe: WriteRecipe, attention: str) -> None:
    """In bfloat16 to its rounding: a row's loss is the sum of its examples' losses; were they one text, it would show."""
    recipe = Recipe.load(write_recipe(), ["model.dtype=bfloat16"])
    model = build_trainable(recipe, CARD, available(attention)).cuda()
    examples = [example(length, length) for length in (33, 257, 90)]
    alone = [loss_and_gradients(model, batch_of(one)) for one in examples]
    whole = batch_of(*examples)
    packed, gradient = loss_and_gradients(model, whole)
    assert packed == pytest.approx(sum(loss for loss, _ in alone), rel=5e-3)
    together = sum(gradient for _, gradient in alone)
    assert float((gradient - together).norm() / together.norm()) < 5e-2
    # positions that do not begin anew; on a CPU the loss is 1 % off then, the gradient 21 %
    one_text = replace(whole, position_ids=torch.arange(whole.input_ids.numel(), device=CARD)[None])
    broken, gradient = loss_and_gradients(model, one_text)
    assert broken != pytest.approx(sum(loss for loss, _ in alone), rel=5e-3)
    assert float((gradient - together).norm() / together.norm()) > 2 * 5e-2


def test_flash_attention_computes_what_sdpa_computes(write_recipe: WriteRecipe) -> None:
    """One packed row, same adapter: loss and gradients within bfloat16's rounding."""
    recipe, row = Recipe.load(write_recipe(), ["model.dtype=bfloat16"]), batch_of(*(example(length, length) for length in (300, 41, 170)))
    found = {name: loss_and_gradients(build_trainable(recipe, CARD, available(name)).cuda(), row) for name in ("flash_attention_2", "sdpa")}
    (flash, flash_gradient), (sdpa, sdpa_gradient) = found.values()
    assert flash == pytest.approx(sdpa, rel=5e-3)
    assert float((flash_gradient - sdpa_gradient).norm() / sdpa_gradient.norm()) < 5e-2


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_nf4_on_the_card(write_recipe: WriteRecipe, tmp_path: Path, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Built into the cache and read from it, the bits of `from_pretrained`; a layer computes with the weights that they mean."""
    monkeypatch.setenv("MISTRAL_DIST_CACHE", str(tmp_path / "cache"))
    model = Recipe.load(write_recipe(), [f"model.dtype={dtype}"]).model
    assert model.path is not None
    built = load_base(model, CARD, "sdpa")
    monkeypatch.setattr(base, "quantize", None)  # nothing is quantized a second time
    kept = load_base(model, CARD, "sdpa")
    wanted = from_pretrained(Path(model.path), getattr(torch, dtype), "nf4")
    assert_same(built, wanted)
    assert_same(kept, wanted)
    layers = {name: module for name, module in built.named_modules() if isinstance(module, bnb.nn.Linear4bit)}
    assert layers
    for name, layer in layers.items():
        again = kept.get_submodule(name).weight
        assert layer.weight.device.type == again.device.type == "cuda"
        assert layer.weight.data.numel() * layer.weight.data.element_size() == layer.in_features * layer.out_features // 2
    layer = layers["model.layers.1.mlp.down_proj"]
    given = torch.randn(64, layer.in_features, generator=torch.Generator().manual_seed(0)).to(CARD, getattr(torch, dtype))
    meant = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(given.dtype)
    product = given.double() @ meant.double().T
    error = float((layer(given).double() - product).norm() / product.norm())
    assert error < {"bfloat16": 1e-2, "float32": 2e-3}[dtype], error


def test_a_card_without_bfloat16_is_refused_by_name(write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Recipe.load(write_recipe(), ["model.dtype=bfloat16"]).model
    if torch.cuda.get_device_capability() >= (8, 0):
        assert compute_dtype(model, CARD) == torch.bfloat16
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: (7, 5))
    with pytest.raises(MachineError, match=re.escape(torch.cuda.get_device_name())):
        compute_dtype(model, CARD)


def test_attention_auto_takes_flash_attention_where_it_is(write_recipe: WriteRecipe) -> None:
    pytest.importorskip("flash_attn", reason="flash-attn is not installed")
    model = Recipe.load(write_recipe(), ["model.dtype=bfloat16"]).model
    assert choose_attention(model, CARD) == "flash_attention_2"


DTYPES = {"float32": [], "bfloat16": ["model.dtype=bfloat16", "train.gradient_checkpointing=true"]}
"""What a recipe in float32 is given to be in one of them; as a 7B is trained, bfloat16 with recomputed layers."""


@pytest.fixture(scope="module")
def recipe(recipe_writer: Callable[[Path], WriteRecipe], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty steps in float32."""
    recipe = recipe_writer(tmp_path_factory.mktemp("zero"))(train={"steps": 20, "global_batch_size": 4})
    assert mistral_dist("prepare", recipe).returncode == 0
    return recipe


@pytest.fixture(scope="module")
def without_zero(recipe: Path) -> Callable[[str], list[float]]:
    """By dtype, the losses of those steps on one card without ZeRO."""
    return functools.cache(lambda dtype: losses(train(recipe, recipe.parent / dtype, *DTYPES[dtype], processes=1, zero=0)))


@pytest.mark.parametrize("dtype", [pytest.param(dtype, marks=pytest.mark.xdist_group(dtype)) for dtype in DTYPES])
@pytest.mark.parametrize("zero", [1, 2, 3, "2+offload", "3+offload"])
def test_zero_on_one_card_learns_what_no_zero_learns(
    recipe: Path, without_zero: Callable[[str], list[float]], tmp_path: Path, zero: int | str, dtype: str
) -> None:
    alone, shared = without_zero(dtype), losses(train(recipe, tmp_path / "shared", *DTYPES[dtype], processes=1, zero=zero))
    if dtype == "float32":
        assert shared == pytest.approx(alone, rel=0, abs=1e-3)
    else:
        assert len(shared) == len(alone)
        assert shared[0] == pytest.approx(alone[0], rel=5e-3, abs=1e-3)
        assert sum(shared) == pytest.approx(sum(alone), rel=0.02)


two_cards = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")


@two_cards
@pytest.mark.xdist_group("float32")
@pytest.mark.parametrize("zero", [0, 2, 3])
def test_two_cards_learn_what_one_learns(recipe: Path, without_zero: Callable[[str], list[float]], tmp_path: Path, zero: int) -> None:
    shared = losses(train(recipe, tmp_path / "shared", processes=2, zero=zero))
    assert shared == pytest.approx(without_zero("float32"), rel=0, abs=1e-3)


@two_cards
@pytest.mark.xdist_group("float32")
def test_a_stop_signal_to_one_worker_stops_both_cards(recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with training(recipe, run, "train.steps=200", "train.epochs=12", until=3) as started:
        workers_of(started.pid)[1].send_signal(signal.SIGTERM)
        assert started.wait(120) == 85
    assert_stopped(run, "on request (SIGTERM)")


def test_a_killed_deterministic_run_ends_with_the_same_bits(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    recipe = write_recipe(model={"dtype": "bfloat16"}, train={"steps": 60, "epochs": 4, "global_batch_size": 4, "deterministic": True})
    assert mistral_dist("prepare", recipe).returncode == 0
    wanted, run = train(recipe, tmp_path / "straight", processes=1, zero=2), tmp_path / "killed"
    with training(recipe, run, until=8, processes=1, zero=2) as started:
        started.kill()
    wait_for(lambda: not workers(run))
    resume(recipe, run, processes=1, zero=2)
    assert metrics(run) == metrics(wanted)
    for file in ("adapter/adapter_model.safetensors", "checkpoints/checkpoint-60/optimizer.safetensors"):
        assert (run / file).read_bytes() == (wanted / file).read_bytes(), file


# memory


@pytest.fixture(scope="module")
def heavy(recipe_writer: Callable[[Path], WriteRecipe], tmp_path_factory: pytest.TempPathFactory, texts: list[dict[str, str]]) -> Path:
    """16 packs of 1,024 tokens a step, each token a target: their logits, as numbers of 2 and 4 bytes, take some 0.5 GB a pack."""
    folder = tmp_path_factory.mktemp("heavy")
    rows: list[dict[str, object]] = [{"text": " ".join(row["text"] for row in (texts * 2)[n : n + 100])} for n in range(200)]
    train = {"steps": 2, "epochs": 9, "global_batch_size": 16, "gradient_checkpointing": True}
    task = {"kind": "pretrain", "labels": [], "system": None}
    data = {"sources": [{"path": str(folder / "heavy.jsonl")}], "max_length": 1024, "near_duplicates": None}
    recipe = recipe_writer(folder)("heavy", rows, task=task, data=data, model={"dtype": "bfloat16"}, train=train)
    assert mistral_dist("prepare", recipe).returncode == 0
    return recipe


SMALL_CARD = faults.environment(card_bytes=5 * GIB)
"""The allocator refuses what goes beyond, as a card of that size does; and that is the size that the card tells."""


def needs_room() -> None:
    if torch.cuda.get_device_properties(0).total_memory < 8 * GIB:
        pytest.skip("the card has less than 8 GiB")


@pytest.mark.xdist_group("memory")
def test_no_memory_is_explained(heavy: Path, tmp_path: Path) -> None:
    needs_room()
    run = tmp_path / "run"
    words = ["train", heavy, f"run.dir={run}", "train.micro_batch_size=16", "--processes", "1"]
    done = mistral_dist(*words, **SMALL_CARD)
    assert done.returncode == 1, done.stdout + done.stderr
    told = status(run)["message"]
    assert re.search(r"^rank 0 on \S+ ran out of GPU memory in step 1, micro-step 1, (forward|backward): ", told), told
    for part in ("frozen base", "adapter", "activations and the rest", "tokens. Go on with train.micro_batch_size=8; or start a new run"):
        assert part in told


@pytest.mark.xdist_group("memory")
def test_the_largest_micro_batch_that_fits_is_found(heavy: Path, tmp_path: Path, figures: Figures) -> None:
    """On a card of 5 GiB, then on all of this one; the run goes through with it, and learns what one pack at a time learns."""
    needs_room()
    found = {}
    for name, limit in (("5 GiB", SMALL_CARD), ("whole", {})):
        run = train(heavy, tmp_path / name[:1], "train.micro_batch_size=auto", processes=1, zero=0, **limit)
        (line,) = re.findall(r"train\.micro_batch_size=auto: .*", (run / "log.txt").read_text())
        found[name] = int(re.match(r"\D*=auto: (\d+)", line)[1])  # type: ignore[index]
        figures[f"micro_batch_size: auto, {name}"] = {
            "found": line,
            "peak_gib": round(lines(run / "metrics.jsonl")[-1]["memory_bytes"] / GIB, 2),
            "losses": losses(run),
        }
    assert 1 < found["5 GiB"] < 16
    assert found["5 GiB"] <= found["whole"] <= 16
    if torch.cuda.get_device_properties(0).total_memory > 23 * GIB:  # what a card of 24 GB has
        assert found["whole"] == 16
    one = losses(train(heavy, tmp_path / "one", "train.micro_batch_size=1", processes=1, zero=0))
    assert losses(tmp_path / "w") == pytest.approx(one, rel=5e-3)
    assert losses(tmp_path / "5") == pytest.approx(one, rel=5e-3)


# the debug mode


@pytest.mark.parametrize("deterministic", [True, False])
def test_the_debug_mode_passes(write_recipe: WriteRecipe, deterministic: bool, figures: Figures) -> None:
    sections = {"model": {"dtype": "bfloat16"}, "lora": {"init_lora_weights": True}}
    recipe = write_recipe(**sections, train={"global_batch_size": 4, "deterministic": deterministic})
    done = mistral_dist("train", recipe, "--debug")
    assert done.returncode == 0, done.stdout + done.stderr
    said = done.stdout.splitlines()
    assert said[-1] == "single-GPU checks passed; NCCL not tested"
    assert "there is no GPU here" not in done.stdout
    (resumed,) = [line for line in said if "ok  resume: " in line]
    assert ("to the bit" if deterministic else "to rounding") in resumed
    debug = run_dir(recipe).with_name(f"{run_dir(recipe).name}-debug")
    memory = next(entry for entry in lines(debug / "debug.jsonl") if entry["what"] == "memory")
    figures[f"debug mode, {'deterministic' if deterministic else 'any kernels'}"] = {
        "resume": resumed.strip(),
        "memory": [memory["told"], *memory["lines"]],
        "tokens_per_second": [entry["tokens_per_second"] for entry in lines(debug / "metrics.jsonl")][5:],
    }


# speed


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("attention", ["eager", "sdpa", "flash_attention_2"])
def test_speed_and_memory_are_reported(write_recipe: WriteRecipe, attention: str, checkpointing: bool, figures: Figures) -> None:
    """No bound, since cards differ: the figures of the small model on long packs, for the record."""
    recipe = Recipe.load(write_recipe(), ["model.dtype=bfloat16", f"train.gradient_checkpointing={str(checkpointing).lower()}"])
    model = build_trainable(recipe, CARD, available(attention)).cuda()
    row = batch_of(*(example(length, length) for length in (1024, 700, 300)))
    loss_and_gradients(model, row)
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.synchronize()
    started = time.monotonic()
    for _ in range(10):
        loss_and_gradients(model, row)
    torch.cuda.synchronize()
    speed = 10 * row.input_ids.numel() / (time.monotonic() - started)
    peak = torch.cuda.max_memory_allocated()
    figures[f"3 layers of a 135M, {attention}{', checkpointing' if checkpointing else ''}"] = {
        "tokens_per_second": round(speed), "peak_gib": round(peak / GIB, 2),
    }  # fmt: skip
    assert peak > sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
