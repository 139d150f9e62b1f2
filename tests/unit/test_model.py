"""The model: precisions, and the traps of its libraries that it steps around."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mistral_dist.base import compute_dtype, load_base
from mistral_dist.config import Lora, Model, Recipe
from mistral_dist.data.encode import Encoded
from mistral_dist.data.stream import Batch, collate
from mistral_dist.errors import MachineError, ModelError
from mistral_dist.evaluate import Candidates, label_row, label_scores
from mistral_dist.hub import load_tokenizer, local_path
from mistral_dist.loss import summed_loss
from mistral_dist.model import (
    adapter_parameters,
    add_adapter,
    build_trainable,
    choose_attention,
    packed_weights,
)

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


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packing_is_invisible(recipe: Callable[..., Recipe], attention: str) -> None:
    """Promise 7: loss and gradient of a packed row are those of its examples alone; in float64, so that nothing hides."""
    model = build_trainable(recipe("model.quantization=none"), CPU, attention).double()
    examples = [encoded(23, 5, 1), encoded(41, 1, 2), encoded(9, 8, 3)]
    losses = [summed_loss(model, batch_of(example)) for example in examples]
    alone = gradients(model, torch.stack(losses).sum())
    packed_loss = summed_loss(model, batch_of(*examples))
    packed = gradients(model, packed_loss)
    torch.testing.assert_close(packed_loss, torch.stack(losses).sum().detach(), rtol=1e-6, atol=0)  # cross-entropy is float32
    for name, gradient in alone.items():
        assert (packed[name] - gradient).norm() <= 1e-6 * gradient.norm(), name


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


def test_a_fresh_adapter_is_the_same_everywhere_and_silent(recipe: Callable[..., Recipe]) -> None:
    made = recipe("lora.init_lora_weights=true")
    models = [build_trainable(made, CPU, "sdpa") for _ in range(2)]
    first, second = (adapter_parameters(model) for model in models)
    assert all(torch.equal(first[name], second[name]) for name in first)
    batch = batch_of(encoded(20, 3, 1))
    with torch.no_grad(), models[0].disable_adapter():
        base = summed_loss(models[0], batch)
    torch.testing.assert_close(summed_loss(models[0], batch).detach(), base, rtol=0, atol=0)


def test_labels_scored_in_one_row_as_each_alone(recipe: Callable[..., Recipe]) -> None:
    model = build_trainable(recipe(), CPU, "sdpa").eval()
    examples = [
        Candidates(encoded(12, 1, 1).ids.tolist(), [[11, 2], [12, 13, 2], [14, 15, 16, 2]]),
        Candidates(encoded(7, 1, 2).ids.tolist(), [[21, 2], [22, 23, 2], [2]]),
    ]
    scores = label_scores(model, label_row(examples), 2, 3, CPU)
    for n, example in enumerate(examples):
        for label, answer in enumerate(example.answers):
            ids = example.prompt + answer
            with torch.no_grad():
                alone = -summed_loss(model, batch_of(Encoded(ids, list(range(len(example.prompt), len(ids))))))
            torch.testing.assert_close(scores[n, label], alone, rtol=1e-5, atol=1e-5)


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
    with pytest.raises(ModelError, match=r"lora.target_modules: .*query"):
        add_adapter(base, Lora(target_modules=("query",)), "x", 0)
