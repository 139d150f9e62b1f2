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
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import peft
import torch

from mistral_dist.base import compute_dtype, load_base
from mistral_dist.config import Lora, Model, Recipe
from mistral_dist.errors import MachineError, ModelError


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
    """The base with a fresh LoRA adapter in float32, the same on every rank: drawn on the CPU from `seed`."""
    config = peft.LoraConfig(
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules),
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
    return model


def build_trainable(recipe: Recipe, device: torch.device, attention: str) -> peft.PeftModel:
    """The model that training starts from: quantized base, fresh adapter, activation checkpointing."""
    base = _frozen(recipe.model, device, attention)
    model = add_adapter(base, recipe.lora, recipe.model.name, recipe.train.seed)
    if recipe.train.gradient_checkpointing:
        # non-reentrant: keeps working when no input requires a gradient, as with a frozen embedding
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def load_tuned(model: Model, adapter: Path, device: torch.device, attention: str) -> peft.PeftModel:
    """The base with a trained adapter, for evaluation and chat, in eval mode."""
    base = _frozen(model, device, attention)
    tuned = peft.PeftModel.from_pretrained(base, str(adapter), is_trainable=False).eval()
    return tuned if model.quantization == "nf4" else tuned.to(device)


def adapter_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The trainable parameters by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def packed_weights(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The packed 4-bit weights: bytes in a float's clothes, never to be converted."""
    return [parameter for parameter in model.parameters() if isinstance(parameter, bnb.nn.Params4bit)]


def _frozen(model: Model, device: torch.device, attention: str) -> Any:
    """The base as everything here uses it: under autocast in bfloat16."""
    return _computing_in(load_base(model, device, attention), compute_dtype(model, device), device)


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
