"""Base + adapter + attention -> trainable model.

Two precisions, and no others: the frozen base in its compute dtype (bfloat16, or float32 for proofs), the adapter always
in float32. In bfloat16 the forward runs under autocast, so each matrix product of the adapter sees a bfloat16 copy while
gradients, moments and updates stay float32. That is the usual pair of working copy and master weights without a second
copy that could go stale: the parameter *is* the master, under every ZeRO stage, so what a checkpoint holds is exactly
what is trained, evaluated and exported. It also keeps DeepSpeed from casting the packed 4-bit weights as if they were
numbers: an engine without a dtype of its own casts nothing.
"""

import functools
import importlib.util
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from mistral_dist.uncompiled import bnb  # before PEFT

# isort: split
import peft
import transformers

from mistral_dist.base import compute_dtype, load_base
from mistral_dist.config import Lora, Model, Recipe
from mistral_dist.errors import MachineError, ModelError
from mistral_dist.linear4bit import let_go_of_weights


def choose_attention(model: Model, device: torch.device) -> str:
    """The attention implementation for `model.attention`. Raises MachineError where the one asked for is not there."""
    flash = importlib.util.find_spec("flash_attn") is not None and device.type == "cuda"
    if model.attention == "auto":
        return "flash_attention_2" if flash and model.dtype != "float32" else "sdpa"
    if model.attention == "flash_attention_2" and not flash:
        raise MachineError("model.attention=flash_attention_2: flash-attn needs a GPU and `pip install flash-attn`; use auto or sdpa")
    if model.attention == "flash_attention_2" and model.dtype == "float32":
        raise MachineError("model.attention=flash_attention_2: has no float32 kernels; use model.attention=sdpa or model.dtype=bfloat16")
    return model.attention


def add_adapter(base: Any, lora: Lora, name: str, seed: int) -> peft.PeftModel:
    """The base with a fresh LoRA adapter in float32, the same on every rank: drawn on the CPU from `seed`.

    Raises ModelError for layers that the base has not, or that cannot be trained that way.
    """
    _refuse_modules(base, lora)
    config = peft.LoraConfig(
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules),
        modules_to_save=list(lora.modules_to_save) or None,
        use_rslora=lora.use_rslora,
        init_lora_weights=lora.init_lora_weights,
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(seed)
    try:
        model = peft.get_peft_model(base, config)
    except ValueError as error:
        raise ModelError(f"lora.target_modules: {lora.target_modules}: {str(error).splitlines()[0]}") from error
    # get_peft_model writes the folder that the base was loaded from; an adapter names its base by its public name
    model.peft_config["default"].base_model_name_or_path = name
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    for module in model.modules():
        if isinstance(module, peft.utils.ModulesToSaveWrapper) and isinstance(module.original_module, torch.nn.Embedding):
            # a float32 embedding would make every hidden state float32, and the model another than the one that is served
            module.register_forward_hook(functools.partial(_as_the_base, module.original_module.weight.dtype))
    return model


def _refuse_modules(base: torch.nn.Module, lora: Lora) -> None:
    """Raise ModelError for what `lora.modules_to_save` must not name, and for adapters on a matrix that has two uses."""
    named = dict(base.named_modules(remove_duplicate=False))
    uses = Counter(id(parameter) for module in named.values() for parameter in module.parameters(recurse=False))
    tied = {name for name, module in named.items() if any(uses[id(own)] > 1 for own in module.parameters(recurse=False))}
    targets = () if isinstance(lora.target_modules, str) else lora.target_modules
    for field, wanted in [*(("target_modules", name) for name in targets), *(("modules_to_save", name) for name in lora.modules_to_save)]:
        found = {name: module for name, module in named.items() if name == wanted or name.endswith(f".{wanted}")}
        place = f"lora.{field}: {wanted}"
        if not found and field == "target_modules":
            names = sorted(
                {name.rpartition(".")[2] for name, module in named.items() if isinstance(module, torch.nn.Linear | torch.nn.Embedding)}
            )
            raise ModelError(f"{place}: this base has no layer of that name; it has {', '.join(names)}")
        if found.keys() & tied:
            remedy = "leave it out, or take a base that does not tie them (Mistral-7B does not)"
            raise ModelError(
                f"{place}: {' and '.join(sorted(tied))} of this base are one matrix, which cannot be trained as one of them; {remedy}"
            )
        if field == "modules_to_save":
            _refuse_saved(place, list(found.values()))


def _refuse_saved(place: str, found: list[torch.nn.Module]) -> None:
    """Raise ModelError unless a name of `lora.modules_to_save` means layers that can be trained whole."""
    if not found:
        raise ModelError(f"{place}: the base has no layer of this name; there are embed_tokens and lm_head")
    if not all(isinstance(module, torch.nn.Linear | torch.nn.Embedding) for module in found):
        kind = type(found[0]).__name__
        raise ModelError(f"{place}: is a {kind}; only embeddings and linear layers can be trained whole, e.g. embed_tokens, lm_head")
    if any(isinstance(parameter, bnb.nn.Params4bit) for module in found for parameter in module.parameters()):
        raise ModelError(f"{place}: is in 4 bits, which cannot be trained; name it in lora.target_modules, or use model.quantization=none")


def _as_the_base(dtype: torch.dtype, _module: torch.nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
    return output.to(dtype)


def build_trainable(recipe: Recipe, device: torch.device, attention: str) -> peft.PeftModel:
    """The model that training starts from: quantized base, fresh adapter, activation checkpointing."""
    base = frozen_base(recipe.model, device, attention)
    model = add_adapter(base, recipe.lora, recipe.model.name, recipe.train.seed)
    if recipe.train.gradient_checkpointing:
        # non-reentrant: keeps working when no input requires a gradient, as with a frozen embedding
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def load_tuned(model: Model, adapter: Path, device: torch.device, attention: str) -> peft.PeftModel:
    """The base with a trained adapter, for evaluation and chat, in eval mode."""
    base = frozen_base(model, device, attention)
    # a base may bring a temperature or a penalty of repetitions, which fill whatever a caller leaves open
    base.generation_config = transformers.GenerationConfig()
    tuned = peft.PeftModel.from_pretrained(base, str(adapter), is_trainable=False).eval()
    return tuned if model.quantization == "nf4" else tuned.to(device)


@contextmanager
def scoring(model: Any) -> Iterator[Any]:
    """The model that is trained, without its engine, in eval mode and without gradients; then in training mode again."""
    model.eval()
    try:
        with torch.no_grad():
            yield model
    finally:
        model.train()


def adapter_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The trainable parameters by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def packed_weights(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The packed 4-bit weights: bytes in a float's clothes, never to be converted."""
    return [parameter for parameter in model.parameters() if isinstance(parameter, bnb.nn.Params4bit)]


def frozen_base(model: Model, device: torch.device, attention: str) -> Any:
    """The base as everything here uses it: under autocast in bfloat16, and no weight held that ZeRO-3 wants to free."""
    base = load_base(model, device, attention)
    let_go_of_weights(base)
    return _computing_in(base, compute_dtype(model, device), device)


def _computing_in(base: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """Let the base's forward run under autocast to bfloat16; float32 stays as it is.

    Inside the module, because DeepSpeed switches off an autocast that is entered around its engine. Without the weight
    cache, because ZeRO-3 frees the weights behind it.
    """
    if dtype == torch.float32:
        return base
    forward = base.forward

    @functools.wraps(forward)
    def under_autocast(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(device.type, dtype=dtype, cache_enabled=False):
            return forward(*args, **kwargs)

    base.forward = under_autocast
    return base
