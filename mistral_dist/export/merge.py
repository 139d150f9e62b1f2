"""Base + adapter -> the tensors of one model, in bounded memory: one weight at a time, one file at a time.

A merged weight is W + s B A (LoRA, arXiv:2106.09685, section 4.1; s = alpha / r, or alpha / sqrt(r) for rsLoRA, arXiv:2312.03732), computed
in float32 and rounded once. W is either what the base was published as, or what its 4-bit code means, which the adapter was trained on.
Nothing is put back into 4 bits, where a small update would vanish.
"""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import load_file

from mistral_dist.base import Checkpoint, dequantize
from mistral_dist.checkpoint import write_tensors
from mistral_dist.errors import CheckpointError
from mistral_dist.export.forms import Form
from mistral_dist.files import read_json, write_text

SHARD_BYTES = 10**9
"""Of one file; this much is held while it is written."""
PREFIX = "base_model.model."
"""Of PEFT's names."""
STRANGE = ("use_dora", "rank_pattern", "alpha_pattern", "lora_bias", "fan_in_fan_out", "trainable_token_indices", "target_parameters")
"""Settings of PEFT's by which an adapter is more than that."""
FACTOR = re.compile(r"(.*)\.lora_(embedding_)?A(?:\.weight)?")


class Update:
    """What an adapter changes in a base, by the base's names of its parameters."""

    def __init__(self, folder: Path) -> None:
        """Raises CheckpointError for an adapter that is damaged, or does more than add a product to a weight, or replace it."""
        settings = read_json(folder / "adapter_config.json") or {}
        strange = [name for name in STRANGE if settings.get(name)] + ["bias"] * (settings.get("bias", "none") != "none")
        if strange:
            raise CheckpointError(f"{folder}: {', '.join(strange)} in its adapter_config.json; such an adapter cannot be merged here")
        try:
            tensors = {name.removeprefix(PREFIX): tensor for name, tensor in load_file(folder / "adapter_model.safetensors").items()}
            rank, alpha = settings["r"], settings["lora_alpha"]
            self._added = {f"{found[1]}.weight": _factors(tensors, name, found[2]) for name in tensors if (found := FACTOR.fullmatch(name))}
        except (OSError, SafetensorError, KeyError) as error:
            raise CheckpointError(f"{folder}: the adapter cannot be read ({error})") from None
        self.scaling: float = alpha / (rank**0.5 if settings.get("use_rslora") else rank)
        self._replaced = {name: tensor for name, tensor in tensors.items() if ".lora_" not in name}
        if 2 * len(self._added) + len(self._replaced) != len(tensors):
            raise CheckpointError(f"{folder}: holds tensors that are neither LoRA's factors nor whole layers; it cannot be merged here")

    @property
    def names(self) -> frozenset[str]:
        """Of the parameters that it changes."""
        return frozenset(self._added) | frozenset(self._replaced)

    def check(self, base: Checkpoint) -> None:
        """Raise CheckpointError for an adapter of another base."""
        for name in sorted(self.names):
            ours = self._replaced[name].shape if name in self._replaced else (self._added[name][0].shape[0], self._added[name][1].shape[1])
            if name not in base.where or base.shape(name) != torch.Size(ours):
                raise CheckpointError(
                    f"{base.path}: has no {name} of shape {tuple(ours)}, which the adapter changes: it is of another base"
                )

    def of(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """A parameter as the tuned model has it, in the dtype of `weight`."""
        if name in self._replaced:
            return self._replaced[name].to(weight.dtype)
        if name not in self._added:
            return weight
        first, second = (factor.to(weight.device, torch.float32) for factor in self._added[name])
        return torch.addmm(weight.float(), first, second, alpha=self.scaling).to(weight.dtype)


def write_merged(form: Form, base: Checkpoint, update: Update, folder: Path, tick: Callable[[int, int], None]) -> None:
    """Write a merged model's weights, in files of 1 GB with an index, as `from_pretrained` reads them; `tick` hears (done, of) in bytes.

    Raises CheckpointError for a weight that is no longer finite, OSError where a file cannot be written.
    """
    layout = split_torch_state_dict_into_shards(
        {name: torch.empty(base.shape(name), dtype=base.dtype, device="meta") for name in base.where}, max_shard_size=SHARD_BYTES
    )
    done = 0
    for file, names in layout.filename_to_tensors.items():
        shard = {}
        for name in names:
            shard[name] = update.of(name, _weight(form, base, name)).contiguous().cpu()
            if not torch.isfinite(shard[name]).all():
                raise CheckpointError(
                    f"{name}: is not finite once the adapter is merged in {base.dtype}; export it with model.dtype=float32"
                )
            done += shard[name].nbytes
            tick(done, layout.metadata["total_size"])
        write_tensors(folder / file, shard)
    if layout.is_sharded:
        index: dict[str, Any] = {"metadata": layout.metadata, "weight_map": layout.tensor_to_filename}
        write_text(folder / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")


def _factors(tensors: Mapping[str, torch.Tensor], name: str, embedding: str | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The two whose product is added: (B, A), of an embedding, whose weight lies the other way, (A^T, B^T)."""
    second = tensors[name.replace(".lora_A", ".lora_B").replace(".lora_embedding_A", ".lora_embedding_B")]
    return (tensors[name].T, second.T) if embedding else (second, tensors[name])


def _weight(form: Form, base: Checkpoint, name: str) -> torch.Tensor:
    """A weight of the base as the form has it."""
    if form is Form.NF4 and name in base.linear:
        prefix = name.removesuffix("weight")
        return dequantize({full.removeprefix(prefix): part for full, part in base.quantized(name).items()})
    return base.plain(name)
