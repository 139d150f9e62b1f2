"""The model: precisions, and the traps of its libraries that it steps around."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from mistral_dist.base import compute_dtype, load_base
from mistral_dist.checkpoint import peft_name
from mistral_dist.config import Lora, Model, Recipe
from mistral_dist.data.encode import Encoded
from mistral_dist.data.stream import Batch, collate
from mistral_dist.errors import MachineError, ModelError
from mistral_dist.hub import load_tokenizer, local_path
from mistral_dist.loss import summed_loss
from mistral_dist.model import (
    adapter_parameters,
    add_adapter,
    build_trainable,
    choose_attention,
    frozen_base,
    packed_weights,
)
from mistral_dist.runtime.engine import seed_noise

CPU = torch.device("cpu")


@pytest.fixture
def recipe(write_recipe: Callable[..., Path]) -> Callable[..., Recipe]:
    return lambda *overrides: Recipe.load(write_recipe(), overrides)


def batch_of(*examples: Encoded) -> Batch:
    return Batch(**collate(examples), ids=())


def encoded(length: int, targets: int, seed: int) -> Encoded:
    ids = torch.randint(100, 40_000, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return Encoded(ids, list(range(length - targets, length)))


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in adapter_parameters(model).items()}


EXAMPLES = (encoded(23, 5, 1), encoded(41, 1, 2), encoded(9, 8, 3))
ROUNDING = {torch.float64: (1e-6, 1e-6), torch.float32: (1e-6, 1e-4), torch.bfloat16: (3e-3, 5e-2)}
"""Of loss and gradient, relatively. Cross-entropy is float32 always."""


def packed_against_alone(model: Any, packed: Batch) -> tuple[float, float]:
    """How far loss and gradient (at its worst parameter) of a packed row are from those of its examples alone, relatively."""
    losses = torch.stack([summed_loss(model, batch_of(example)) for example in EXAMPLES])
    alone = gradients(model, losses.sum())
    loss = summed_loss(model, packed)
    together = gradients(model, loss)
    worst = max(float((together[name] - gradient).norm() / gradient.norm()) for name, gradient in alone.items())
    return abs(float((loss / losses.sum()).detach()) - 1), worst


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_packing_is_invisible(recipe: Callable[..., Recipe], attention: str, dtype: torch.dtype) -> None:
    """Promise 7: loss and gradient of a packed row are those of its examples alone; in float64, so that nothing hides."""
    name = "bfloat16" if dtype is torch.bfloat16 else "float32"
    model = build_trainable(recipe("model.quantization=none", f"model.dtype={name}"), CPU, attention)
    model = model.double() if dtype is torch.float64 else model
    found = packed_against_alone(model, batch_of(*EXAMPLES))
    print(f"{attention}, {dtype}: loss within {found[0]:.1e}, gradient within {found[1]:.1e}")
    assert found[0] <= ROUNDING[dtype][0] and found[1] <= ROUNDING[dtype][1]
    # and the proof can fail: were the examples one text, or their positions those of the row, it would show
    whole = batch_of(*EXAMPLES)
    one_text = replace(whole, position_ids=torch.arange(whole.input_ids.numel())[None])
    broken = packed_against_alone(model, one_text)
    print(f"{attention}, {dtype}, without restarts: loss {broken[0]:.1e}, gradient {broken[1]:.1e}")
    assert broken[0] > 3 * ROUNDING[dtype][0] and broken[1] > 3 * ROUNDING[dtype][1]


def test_flex_attention_cannot_train_here() -> None:
    """Why recipes refuse it: what has no backward pass cannot be shown to keep packed examples apart."""
    query = torch.randn(1, 1, 8, 16, requires_grad=True)
    with pytest.raises(NotImplementedError, match="does not support backward on CPU"):
        flex_attention(query, query, query)


def test_only_targets_count(recipe: Callable[..., Recipe]) -> None:
    """The loss is the full cross-entropy at the targets, although only those positions reach the output head."""
    model = build_trainable(recipe(), CPU, "sdpa")
    example = encoded(30, 4, 5)
    logits = model(input_ids=torch.from_numpy(example.ids)[None].long(), use_cache=False).logits[0]
    wanted = torch.nn.functional.cross_entropy(logits[25:29].float(), torch.from_numpy(example.ids[26:]).long(), reduction="sum")
    torch.testing.assert_close(summed_loss(model, batch_of(example)), wanted, rtol=1e-6, atol=0)


def test_an_empty_pack_gives_zero_loss_and_zero_gradients(recipe: Callable[..., Recipe]) -> None:
    model = build_trainable(recipe(), CPU, "sdpa")
    loss = summed_loss(model, batch_of())
    assert loss.item() == 0
    assert all(gradient.abs().max() == 0 for gradient in gradients(model, loss).values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_evaluating_between_steps_changes_nothing(recipe: Callable[..., Recipe], dtype: str) -> None:
    """bitsandbytes 0.50 repacks 4-bit weights at a forward in eval mode on some CPUs; later gradients would be gone."""
    model = build_trainable(recipe(f"model.dtype={dtype}"), CPU, "sdpa")
    batch = batch_of(encoded(30, 4, 5))
    before = gradients(model, summed_loss(model, batch))
    packed = [weight.clone() for weight in packed_weights(model)]
    model.eval()
    with torch.no_grad():
        summed_loss(model, batch)
    model.train()
    after = gradients(model, summed_loss(model, batch))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(packed, packed_weights(model), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_adapter_is_float32_and_the_base_frozen_nf4(recipe: Callable[..., Recipe], dtype: torch.dtype) -> None:
    model = build_trainable(recipe(f"model.dtype={str(dtype).removeprefix('torch.')}"), CPU, "sdpa")
    assert {parameter.dtype for parameter in adapter_parameters(model).values()} == {torch.float32}
    frozen = {parameter.dtype for parameter in model.parameters() if not parameter.requires_grad}
    assert frozen == {dtype}
    weights = packed_weights(model)
    assert len(weights) == 7 * 3
    assert all(weight.quant_state.quant_type == "nf4" and weight.quant_state.nested for weight in weights)
    gradient = gradients(model, summed_loss(model, batch_of(encoded(20, 3, 1))))
    assert {g.dtype for g in gradient.values()} == {torch.float32}


def test_bfloat16_products_are_bfloat16(recipe: Callable[..., Recipe]) -> None:
    """The adapter's matrix products run in the compute dtype, though its parameters are float32."""
    model = build_trainable(recipe("model.dtype=bfloat16"), CPU, "sdpa")
    seen: list[torch.dtype] = []
    hook = next(m for n, m in model.named_modules() if n.endswith("lora_A.default")).register_forward_hook(
        lambda m, i, o: seen.append(o.dtype)
    )
    summed_loss(model, batch_of(encoded(20, 3, 1)))
    hook.remove()
    assert seen == [torch.bfloat16]


def test_checkpointing_changes_no_gradient(recipe: Callable[..., Recipe]) -> None:
    batch = batch_of(encoded(30, 4, 5), encoded(10, 2, 6))
    plain, recomputed = (build_trainable(recipe(f"train.gradient_checkpointing={on}"), CPU, "sdpa") for on in ("false", "true"))
    wanted, found = gradients(plain, summed_loss(plain, batch)), gradients(recomputed, summed_loss(recomputed, batch))
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)


def test_checkpointing_recomputes_the_same_noise(recipe: Callable[..., Recipe]) -> None:
    """The mask of the backward pass is that of the forward pass, and both are the slot's."""
    batch = batch_of(encoded(30, 4, 5), encoded(10, 2, 6))

    def noisy(on: str, slot: int) -> dict[str, torch.Tensor]:
        model = build_trainable(recipe(f"train.gradient_checkpointing={on}", "lora.lora_dropout=0.3"), CPU, "sdpa")
        seed_noise(0, 7, slot)
        return gradients(model, summed_loss(model, batch))

    wanted, found, other = noisy("false", 2), noisy("true", 2), noisy("true", 3)
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    assert not any(torch.equal(wanted[name], other[name]) for name in wanted)


def test_a_fresh_adapter_is_the_same_everywhere_and_silent(recipe: Callable[..., Recipe]) -> None:
    made = recipe("lora.init_lora_weights=true")
    models = [build_trainable(made, CPU, "sdpa") for _ in range(2)]
    first, second = (adapter_parameters(model) for model in models)
    assert all(torch.equal(first[name], second[name]) for name in first)
    batch = batch_of(encoded(20, 3, 1))
    with torch.no_grad(), models[0].disable_adapter():
        base = summed_loss(models[0], batch)
    torch.testing.assert_close(summed_loss(models[0], batch).detach(), base, rtol=0, atol=0)


def test_attention_is_chosen_by_what_is_there(recipe: Callable[..., Recipe]) -> None:
    assert choose_attention(recipe().model, CPU) == "sdpa"
    assert choose_attention(recipe("model.attention=eager").model, CPU) == "eager"
    with pytest.raises(MachineError, match=r"flash-attn needs a GPU .*use auto or sdpa"):
        choose_attention(recipe("model.attention=flash_attention_2").model, CPU)


def test_a_card_without_bfloat16_is_refused_by_name(recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with pytest.raises(MachineError, match=r"Tesla T4: has no bfloat16 .*model.dtype=float32"):
        compute_dtype(recipe("model.dtype=auto").model, torch.device("cuda"))
    assert compute_dtype(recipe("model.dtype=float32").model, torch.device("cuda")) == torch.float32


def test_a_missing_model_names_the_way_to_it(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model.path: .*no model there"):
        local_path(Model(name="org/model", path=str(tmp_path)))
    with pytest.raises(ModelError, match=r"org/model \(main\) is not on this machine; run `mistral-dist fetch"):
        load_tokenizer(Model(name="org/model"))


def test_target_modules_that_do_not_exist_are_refused(recipe: Callable[..., Recipe]) -> None:
    base = load_base(recipe().model, CPU, "sdpa")
    with pytest.raises(ModelError, match=r"lora.target_modules: query: this base has no layer of that name; it has down_proj, .*q_proj"):
        add_adapter(base, Lora(target_modules=("query",)), "x", 0)


def untied(recipe: Recipe, dtype: str = "float32", quantization: str = "nf4") -> Any:
    """A base whose output head is a matrix of its own, as Mistral-7B's is, as training loads it."""
    base = frozen_base(recipe.model.model_copy(update={"dtype": dtype, "quantization": quantization}), CPU, "sdpa")
    base.lm_head.weight = torch.nn.Parameter(base.lm_head.weight.detach().clone(), requires_grad=False)
    base.config.tie_word_embeddings = False
    return base


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        (Lora(modules_to_save=("lm_head",)), "lora.modules_to_save: lm_head: lm_head and model.embed_tokens of this base are one matrix"),
        (Lora(target_modules=("q_proj", "embed_tokens")), "lora.target_modules: embed_tokens: .* are one matrix"),
    ],
)
def test_one_of_two_tied_layers_is_not_trained(recipe: Callable[..., Recipe], lora: Lora, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        add_adapter(load_base(recipe().model, CPU, "sdpa"), lora, "x", 0)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("q_proj", "is in 4 bits, which cannot be trained; name it in lora.target_modules"),
        ("head", "the base has no layer of this name; there are embed_tokens and lm_head"),
        ("norm", "is a MistralRMSNorm; only embeddings and linear layers"),
        ("mlp", "is a MistralMLP; only embeddings and linear layers"),
    ],
)
def test_what_cannot_be_trained_whole_is_refused(recipe: Callable[..., Recipe], name: str, words: str) -> None:
    with pytest.raises(ModelError, match=f"lora.modules_to_save: {name}: {words}"):
        add_adapter(untied(recipe()), Lora(modules_to_save=(name,)), "x", 0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layers_trained_whole_are_float32_named_as_in_peft_and_no_other_model(recipe: Callable[..., Recipe], dtype: str) -> None:
    base = untied(recipe(), dtype)
    batch = batch_of(encoded(30, 4, 5))
    with torch.no_grad():
        before = summed_loss(base, batch)
    model = add_adapter(base, Lora(modules_to_save=("embed_tokens", "lm_head")), "x", 0)
    found = adapter_parameters(model)
    assert {parameter.dtype for parameter in found.values()} == {torch.float32}
    assert {peft_name(name) for name in found} == set(peft.get_peft_model_state_dict(model, save_embedding_layers=False))
    assert {f"base_model.model.{name}.weight" for name in ("lm_head", "model.embed_tokens")} < {peft_name(name) for name in found}
    loss = summed_loss(model, batch)
    torch.testing.assert_close(loss.detach(), before, rtol=0, atol=0)
    gradient = gradients(model, loss)
    assert all(gradient[name].abs().max() > 0 for name in gradient if "modules_to_save" in name)


def test_adapters_of_embeddings_are_named_as_in_peft(recipe: Callable[..., Recipe]) -> None:
    model = add_adapter(untied(recipe()), Lora(target_modules=("embed_tokens", "lm_head")), "x", 0)
    assert {peft_name(name) for name in adapter_parameters(model)} == set(
        peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    )


def test_chosen_layers_are_those_that_are_named(recipe: Callable[..., Recipe]) -> None:
    model = add_adapter(load_base(recipe().model, CPU, "sdpa"), Lora(target_modules=("q_proj", "layers.1.mlp.up_proj")), "x", 0)
    layers = {name.split(".lora_")[0].partition("layers.")[2] for name in adapter_parameters(model)}
    assert layers == {"0.self_attn.q_proj", "1.self_attn.q_proj", "2.self_attn.q_proj", "1.mlp.up_proj"}
