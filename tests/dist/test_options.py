"""What a recipe can choose (layers, scales, schedules, weights, noise) means on any ranks what it means to plain PEFT.

Real processes; the yardstick is transformers and PEFT alone: they load the adapter of a checkpoint and give, on the examples of the
next step, each by itself, the loss that the run went on with.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from mistral_dist.config import Recipe
from mistral_dist.data.encode import load_encoder
from mistral_dist.data.example import from_record
from mistral_dist.data.shards import read_shards
from mistral_dist.data.split import SPLITS
from mistral_dist.model import load_tuned
from mistral_dist.optim import lr_at
from tests.conftest import WriteRecipe
from tests.launch import kill, lines, losses, metrics, mistral_dist, resume, train, training, wait_for, workers

STEPS = 5
WEIGHTS = {"numpy": 4.0, "pandas": 0.25}
OPTIONS = {
    "rsLoRA on chosen layers, weights, smoothing, linear": [
        "lora.use_rslora=true",
        "lora.target_modules=[q_proj, v_proj, layers.1.mlp.down_proj]",
        "lora.lora_alpha=3",
        "optim.lr_scheduler_type=linear",
        f"task.class_weights={json.dumps(WEIGHTS)}",
        "train.label_smoothing_factor=0.1",
    ],
    "LoRA on a bfloat16 base, constant": [
        "model.quantization=none",
        "model.dtype=bfloat16",
        "optim.lr_scheduler_type=constant",
    ],
    "class weights of a stream, cosine": [f"task.class_weights={json.dumps(WEIGHTS)}", "data.streaming=true", "data.block=16"],
}


@pytest.fixture(scope="module")
def recipe(recipe_writer: Callable[[Path], WriteRecipe], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few steps, each with a checkpoint, prepared."""
    write = recipe_writer(tmp_path_factory.mktemp("options"))
    made = write(
        train={"steps": STEPS, "global_batch_size": 4},
        checkpoint={"save_steps": 1, "save_total_limit": STEPS},
        optim={"learning_rate": 3e-3, "warmup_ratio": 0.2},
    )
    assert mistral_dist("prepare", made).returncode == 0
    return made


@pytest.fixture(scope="module")
def untied_model(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A narrow Mistral whose output head is a matrix of its own, with random weights and the small model's tokenizer."""
    target = tmp_path_factory.mktemp("untied") / "untied"
    config = transformers.AutoConfig.from_pretrained(small_model)
    narrow = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config.update({**narrow, "head_dim": 16, "tie_word_embeddings": False})
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(target)
    transformers.AutoTokenizer.from_pretrained(small_model).save_pretrained(target)
    return target


@dataclass
class Plain:
    """A recipe's model with a saved adapter, in the hands of transformers and PEFT."""

    recipe: Recipe
    adapter: Path

    def __post_init__(self) -> None:
        dtype = getattr(torch, self.recipe.model.dtype)
        nf4 = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
        quantization = nf4 if self.recipe.model.quantization == "nf4" else None
        base = transformers.AutoModelForCausalLM.from_pretrained(self.recipe.model.path, quantization_config=quantization, dtype=dtype)
        for module in base.modules():  # else it computes in bfloat16 on some CPUs, whatever was asked for
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        self.model: Any = peft.PeftModel.from_pretrained(base, str(self.adapter)).eval()

    @torch.no_grad()
    def loss(self, ids: Sequence[str]) -> float:
        """The weighted mean over the targets of these examples, each alone in a forward."""
        encoder, weights = load_encoder(self.recipe), self.recipe.task.class_weights or {}
        assert isinstance(weights, dict)
        records = {record["id"]: record for split in SPLITS for record in read_shards(self.recipe.data_dir / split)}
        total, weight = 0.0, 0.0
        for record in (records[id] for id in ids):
            encoded = encoder.encode(from_record(record))
            tokens = torch.from_numpy(encoded.ids).long()
            wanted = torch.nn.functional.cross_entropy(
                self.model(input_ids=tokens[None]).logits[0, encoded.targets - 1].float(),
                tokens[encoded.targets],
                reduction="sum",
                label_smoothing=self.recipe.train.label_smoothing_factor,
            )
            total += weights.get(record["label"], 1.0) * float(wanted)
            weight += weights.get(record["label"], 1.0) * len(encoded.targets)
        return total / weight


ROUNDING = {"bfloat16": 2**-8, "float32": 1e-5}
"""What part of a loss may differ, by dtype. bfloat16's epsilon is 2^-8: on some processors a loss of 30 was off by 0.034."""


def assert_plain_peft_agrees(recipe: Path, overrides: Sequence[str], run: Path, step: int) -> None:
    """The loss of a step is that of plain PEFT with the checkpoint before it; and it is the adapter's doing."""
    loaded = Recipe.load(recipe, overrides)
    adapter = run / "checkpoints" / f"checkpoint-{step - 1}" / "adapter"
    plain = Plain(loaded, adapter)
    ids = lines(run / "data_order.jsonl")[step - 1]["ids"]
    found = plain.loss(ids)
    with plain.model.disable_adapter():
        without = plain.loss(ids)
    print(f"step {step}: {losses(run)[step - 1]:.6f}, plain PEFT {found:.6f}, without the adapter {without:.6f}")
    rounding = ROUNDING[loaded.model.dtype]
    assert found == pytest.approx(losses(run)[step - 1], rel=rounding, abs=0)
    assert abs(without - found) > max(0.02, 5 * rounding * found)
    row = torch.arange(1000, 1040)[None]
    with torch.no_grad():
        ours = load_tuned(loaded.model, adapter, torch.device("cpu"), "sdpa")(input_ids=row).logits
        theirs = plain.model(input_ids=row).logits
    apart = float((ours - theirs).norm() / theirs.norm())
    print(f"logits: {apart:.1e} apart")
    assert apart < 5 * rounding


def assert_every_tensor_moved(run: Path) -> None:
    first, last = (
        peft.utils.load_peft_weights(str(run / "checkpoints" / f"checkpoint-{step}" / "adapter"), device="cpu") for step in (1, STEPS)
    )
    assert first.keys() == last.keys()
    assert all(not torch.equal(first[name], last[name]) for name in first)


@pytest.mark.parametrize("option", [pytest.param(name, marks=pytest.mark.matrix) if "bfloat16" in name else name for name in OPTIONS])
def test_an_option_means_on_any_ranks_what_it_means_to_plain_peft(recipe: Path, option: str, tmp_path: Path) -> None:
    overrides = OPTIONS[option]
    alone = train(recipe, tmp_path / "alone", *overrides, processes=1, zero=0)
    shared = train(recipe, tmp_path / "shared", *overrides, processes=2, zero=2)
    loaded = Recipe.load(recipe, overrides)
    optim, rounding = loaded.optim, ROUNDING[loaded.model.dtype]
    for run in (alone, shared):
        assert losses(run)[-1] < losses(run)[0]
        assert_every_tensor_moved(run)
        assert [entry["learning_rate"] for entry in metrics(run)] == [lr_at(step, STEPS, optim) for step in range(STEPS)]
        assert_plain_peft_agrees(recipe, overrides, run, STEPS)
    assert lines(alone / "data_order.jsonl") == lines(shared / "data_order.jsonl")
    for here, there in zip(metrics(shared), metrics(alone), strict=True):
        assert here["trained_tokens"] == there["trained_tokens"]
        assert here["loss"] == pytest.approx(there["loss"], rel=rounding, abs=0)
        assert here["grad_norm"] == pytest.approx(there["grad_norm"], rel=50 * rounding)


def assert_goes_on_to_the_same_bits(recipe: Path, overrides: Sequence[str], wanted: Path, run: Path, zero: int) -> None:
    """A run killed by force after its third step ends with the files of the one that was not."""
    with training(recipe, run, *overrides, until=3, zero=zero) as started:
        kill(started.pid)
        wait_for(lambda: not workers(run))
    resume(recipe, run, *overrides, zero=zero)
    last = f"checkpoints/checkpoint-{STEPS}/optimizer.safetensors"
    for file in ("adapter/adapter_model.safetensors", "adapter/adapter_config.json", last):
        assert (run / file).read_bytes() == (wanted / file).read_bytes(), file
    assert metrics(run) == metrics(wanted)


@pytest.mark.matrix
def test_layers_trained_whole_are_the_same_under_every_stage_and_through_a_kill(recipe: Path, untied_model: Path, tmp_path: Path) -> None:
    overrides = [f"model.path={untied_model}", "lora.modules_to_save=[lm_head, embed_tokens]", "model.dtype=float32"]
    runs = {zero: train(recipe, tmp_path / f"zero{zero}", *overrides, processes=2 if zero else 1, zero=zero) for zero in range(4)}
    assert_plain_peft_agrees(recipe, overrides, runs[3], STEPS)
    config = json.loads((runs[3] / "adapter/adapter_config.json").read_text())
    assert config["modules_to_save"] == ["embed_tokens", "lm_head"]
    for zero, run in runs.items():
        assert_every_tensor_moved(run)
        worst = max(abs(a - b) for a, b in zip(losses(run), losses(runs[0]), strict=True))
        print(f"ZeRO-{zero}: losses within {worst:.1e} of one process, {losses(run)[0]:.4f} to {losses(run)[-1]:.4f}")
        assert worst <= 1e-4
    assert_goes_on_to_the_same_bits(recipe, overrides, runs[3], tmp_path / "killed", zero=3)


def test_dropout_is_the_slot_s(recipe: Path, untied_model: Path, tmp_path: Path) -> None:
    """The same noise through a kill, in recomputed layers, and on other ranks where a micro-batch is one pack; with two it is another."""
    overrides = [f"model.path={untied_model}", "lora.lora_dropout=0.5", "lora.lora_alpha=16", "train.gradient_checkpointing=true"]
    run = train(recipe, tmp_path / "run", *overrides)
    assert_goes_on_to_the_same_bits(recipe, overrides, run, tmp_path / "killed", zero=2)
    alone = losses(train(recipe, tmp_path / "alone", *overrides, "train.gradient_checkpointing=false", processes=1, zero=0))
    assert max(abs(a - b) for a, b in zip(losses(run), alone, strict=True)) <= 1e-4
    pairs = losses(train(recipe, tmp_path / "pairs", *overrides, "train.micro_batch_size=2", processes=1, zero=0))
    assert max(abs(a - b) for a, b in zip(pairs, alone, strict=True)) > 1e-3
    assert abs(pairs[0] / alone[0] - 1) < 0.05
