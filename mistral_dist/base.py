"""The frozen base, loaded in bounded memory: tensor by tensor, quantized as it is read, or read as it was quantized before.

The library builds the model (which modules are quantized, tied weights, buffers), as in `from_pretrained`; only the tensors
are ours. They are handed over as a state dict whose values are read when they are asked for, in the layout of a model that
was saved quantized. So the result is that of `from_pretrained` to the bit, and no more is ever held than the result and the
few tensors in work. They are read with pread, not mapped: the page cache may keep the files, the process does not.

A base that is not laid out as expected (GGUF, .bin, code of its own, weights under other names) is left to
`from_pretrained`, which peaks higher.
"""

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.quantizers import AutoHfQuantizer

from mistral_dist import base_cache
from mistral_dist.base_cache import SETTINGS, Entry, weight_files
from mistral_dist.config import Model
from mistral_dist.errors import MachineError, MistralDistError, ModelError
from mistral_dist.hub import local_path
from mistral_dist.runtime import process
from mistral_dist.uncompiled import bnb

SLICE = 1 << 18
"""Values that are quantized at once, a multiple of every block: temporaries of 1 MB each. A whole weight of a 7B would take
1.2 GB of them, and slices of 16 MB leave holes between what stays."""
SHARD_BYTES = 128 * 2**20
"""A file of the cache; this much is held while it is written."""

Tensors = dict[str, "Lazy"]


class Lazy:
    """A tensor that is read when the library takes it, as it takes a slice of a safetensors file."""

    def __init__(self, read: Callable[[], torch.Tensor]) -> None:
        self._read = read

    def __getitem__(self, _: Any) -> torch.Tensor:
        return self._read()

    def get_dtype(self) -> str:
        """The library asks whether to convert: no, all conversions are done here."""
        return "U8"


class DamagedError(Exception):
    """A tensor of the cache is not what was written."""


def compute_dtype(model: Model, device: torch.device) -> torch.dtype:
    """bfloat16 unless the recipe says float32. Raises MachineError for a GPU that has no bfloat16, by its name."""
    if model.dtype == "float32":
        return torch.float32
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        name = torch.cuda.get_device_name(device)
        raise MachineError(f"{name}: has no bfloat16 (NVIDIA cards have it from Ampere, 2020, on); use another card or model.dtype=float32")
    return torch.bfloat16


def load_base(model: Model, device: torch.device, attention: str) -> Any:
    """The frozen base, in eval mode: its linear layers in NF4 with double quantisation, or as they are.

    Without a device map, which ZeRO-3 forbids: a quantized model goes to the current GPU by itself, another stays on the
    CPU until it is prepared or moved. Raises ModelError for a base that cannot be loaded or lacks weights.
    """
    dtype = compute_dtype(model, device)
    path = local_path(model)
    transformers.utils.logging.disable_progress_bar()
    # else the library's threads read ahead, and hold what they have read
    process.default_environment(HF_DEACTIVATE_ASYNC_LOAD="1")
    try:
        base = _streamed(model, path, dtype, device, attention)
        if base is None:
            base = transformers.AutoModelForCausalLM.from_pretrained(
                path,
                dtype=dtype,
                quantization_config=_settings(dtype) if model.quantization == "nf4" else None,
                attn_implementation=attention,
                trust_remote_code=model.trust_remote_code,
            )
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(f"{path}: cannot be loaded as a causal language model: {str(error).splitlines()[0]}") from error
    for module in base.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            # bitsandbytes 0.50 repacks the weights in place at the first forward in eval mode on CPUs with AVX512-BF16,
            # after which training has no gradient and ZeRO-3 shards garbage
            module.support_avx512bf16_for_cpu = False
    base.requires_grad_(False)
    base.config.use_cache = False
    return base


def quantize(weight: torch.Tensor, dtype: torch.dtype, device: torch.device) -> dict[str, torch.Tensor]:
    """A weight in NF4 with double quantisation, in the parts that a saved model has ("weight", "weight.absmax", ...).

    Bit for bit what bitsandbytes makes of the whole weight in `dtype` on `device`, but in slices: a block's code depends on
    the block alone. The packed nibbles are stored as `dtype`, as with bnb_4bit_quant_storage=dtype: a base of one dtype
    throughout. ZeRO-3 would shard uint8 as well (measured with DeepSpeed 0.19.8).
    """
    flat = weight.reshape(-1)
    packed = torch.empty((flat.numel() + 1) // 2, dtype=torch.uint8, device=device)
    scales = []
    for start in range(0, flat.numel(), SLICE):
        part = flat[start : start + SLICE].to(device=device, dtype=dtype)
        codes, state = bnb.functional.quantize_4bit(part, blocksize=SETTINGS["blocksize"], quant_type=SETTINGS["quant_type"])
        packed[start // 2 : start // 2 + len(codes)] = codes[:, 0]
        scales.append(state.absmax)
    absmax = torch.cat(scales)
    offset = absmax.mean()
    absmax, state2 = bnb.functional.quantize_blockwise(absmax - offset, blocksize=256)
    whole = bnb.functional.QuantState(absmax, weight.shape, state.code, state.blocksize, state.quant_type, dtype, offset, state2)
    parts = {f"weight.{name}": part for name, part in whole.as_dict(packed=True).items()}
    return {"weight": packed.view(dtype).unsqueeze(1), **parts}


def dequantize(parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The weight that the parts of `quantize` mean, as a layer computes with it, in the dtype that they were made from."""
    state = bnb.functional.QuantState.from_dict({name: part for name, part in parts.items() if name != "weight"}, parts["weight"].device)
    return bnb.functional.dequantize_4bit(parts["weight"].view(torch.uint8).view(-1, 1), state)


def _settings(dtype: torch.dtype) -> transformers.BitsAndBytesConfig:
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=SETTINGS["quant_type"],
        bnb_4bit_use_double_quant=SETTINGS["double_quant"],
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype,
    )


class Checkpoint:
    """A base's own files, and what the model makes of the tensors in them."""

    def __init__(self, path: Path, files: Mapping[str, Path], linear: Mapping[str, int], dtype: torch.dtype, device: torch.device) -> None:
        self.path, self.dtype, self.device = path, dtype, device
        self.handles = {file: safe_open(file, framework="pt", backend="pread") for file in files.values()}
        self.where = {name: handle for handle in self.handles.values() for name in handle.keys()}  # noqa: SIM118
        self.linear = linear
        """The weights to be quantized, by name, and how many values they have."""

    def read(self, name: str) -> torch.Tensor:
        """A tensor as it is in the files."""
        return self.where[name].get_tensor(name)

    def shape(self, name: str) -> torch.Size:
        """Of a tensor, which is not read."""
        return torch.Size(self.where[name].get_slice(name).get_shape())

    def plain(self, name: str) -> torch.Tensor:
        """A tensor that is not quantized, in the compute dtype."""
        tensor = self.read(name)
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor

    def quantized(self, name: str) -> dict[str, torch.Tensor]:
        """The parts of a weight, by full name."""
        prefix = name.removesuffix("weight")
        return {prefix + part: tensor for part, tensor in quantize(self.read(name), self.dtype, self.device).items()}

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """All tensors of the quantized model, in the order of the files."""
        for name in self.where:
            if name in self.linear:
                yield from self.quantized(name).items()
            else:
                yield name, self.plain(name)

    def bytes(self) -> int:
        """About what the quantized model takes: 4 bits a value and 3 % for their scales."""
        size = self.dtype.itemsize
        others = (self.shape(name).numel() for name in self.where if name not in self.linear)
        return int(sum(self.linear.values()) * 0.515) + sum(others) * size

    def lazy(self) -> Tensors:
        """The quantized model's tensors, each weight quantized when the first of its parts is taken."""
        found: Tensors = {}
        for name in self.where:
            if name not in self.linear:
                found[name] = Lazy(partial(self.plain, name))
                continue
            parts: dict[str, torch.Tensor] = {}
            for part in _PARTS:
                full = name.removesuffix("weight") + part
                found[full] = Lazy(partial(self._part, name, full, parts))
        return found

    def _part(self, name: str, full: str, parts: dict[str, torch.Tensor]) -> torch.Tensor:
        if not parts:
            parts.update(self.quantized(name))
        return parts.pop(full)


_PARTS = (
    "weight",
    "weight.absmax",
    "weight.quant_map",
    "weight.nested_absmax",
    "weight.nested_quant_map",
    "weight.quant_state.bitsandbytes__nf4",
)


def _streamed(model: Model, path: Path, dtype: torch.dtype, device: torch.device, attention: str) -> Any | None:
    """The base from its safetensors or from the cache; None where it must be left to `from_pretrained`."""
    config = _config(model, path)
    if config is None:
        return None

    def built(tensors: Tensors) -> Any:
        return _assembled(config, path, dtype, attention, tensors)

    def kept(entry: Entry | None) -> Any | None:
        try:
            return None if entry is None else built(_kept(entry))
        except DamagedError as damage:
            _note(f"note: {damage}")
            return None

    if model.quantization == "nf4":
        config.quantization_config = _settings(dtype).to_dict()
    entry = base_cache.find(model, device.type)
    base = kept(entry)
    if base is not None:
        return base
    checkpoint = _open(config, path, dtype, device)
    if checkpoint is None:
        return None
    base = kept(_ensure(model, checkpoint, damaged=entry))
    return built(checkpoint.lazy()) if base is None else base


def _config(model: Model, path: Path) -> Any | None:
    """The base's configuration, if the base is of the ordinary kind."""
    if model.quantization == "none" and is_deepspeed_zero3_enabled():
        return None  # the library itself shards while it loads, and rank 0 maps the files
    if not weight_files(path) or (path / "adapter_config.json").is_file():
        return None
    config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=model.trust_remote_code)
    extraordinary = ("auto_map", "quantization_config", "transformers_weights")
    if any(getattr(config, name, None) is not None for name in extraordinary):
        return None
    if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING or _kind(config)._keep_in_fp32_modules_strict:
        return None
    return config


def _kind(config: Any) -> Any:
    """The library's class of model."""
    return transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


def open_checkpoint(model: Model, device: torch.device) -> Checkpoint | None:
    """A base's files, tensor by tensor, with what would be quantized; None where the base is not laid out as expected.

    Raises ModelError for a file that is missing or damaged.
    """
    dtype, path = compute_dtype(model, device), local_path(model)
    config = _config(model, path)
    if config is None:
        return None
    config.quantization_config = _settings(dtype).to_dict()
    try:
        return _open(config, path, dtype, device)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path}: cannot be read ({str(error).splitlines()[0]}); fetch or copy the base again") from None


def _open(config: Any, path: Path, dtype: torch.dtype, device: torch.device) -> Checkpoint | None:
    """The base's files, if its linear weights are in them under the model's own names."""
    with torch.device("meta"):
        skeleton = _kind(config)(config)
        sizes = {name: parameter.numel() for name, parameter in skeleton.named_parameters()}
        if hasattr(config, "quantization_config"):
            AutoHfQuantizer.from_config(config.quantization_config, pre_quantized=True).preprocess_model(skeleton, device_map=None)
    linear = {f"{name}.weight": module for name, module in skeleton.named_modules() if isinstance(module, bnb.nn.Linear4bit)}
    checkpoint = Checkpoint(path, weight_files(path), {name: sizes[name] for name in linear}, dtype, device)
    ordinary = all(module.source_cls is torch.nn.Linear for module in linear.values())
    return checkpoint if ordinary and linear.keys() <= checkpoint.where.keys() else None


def _assembled(config: Any, path: Path, dtype: torch.dtype, attention: str, tensors: Tensors) -> Any:
    """The library's model around these tensors."""
    generation = transformers.GenerationConfig.from_pretrained(path) if (path / "generation_config.json").is_file() else None
    base, loading = _kind(config).from_pretrained(
        None,
        config=config,
        dtype=dtype,
        attn_implementation=attention,
        state_dict=tensors,
        generation_config=generation,
        output_loading_info=True,
    )
    missing = sorted(loading["missing_keys"])
    if missing:
        raise ModelError(f"{path}: {len(missing)} weights are missing, the first is {missing[0]}; fetch or copy the base again")
    base.config.name_or_path = base.name_or_path = str(path)
    return base


def _ensure(model: Model, checkpoint: Checkpoint, damaged: Entry | None = None) -> Entry | None:
    """The base's entry in the cache, written from its files where there is none."""
    return base_cache.ensure(
        model, checkpoint.device.type, checkpoint.bytes(), lambda folder: _write(checkpoint.tensors(), folder), _note, damaged
    )


def _write(tensors: Iterator[tuple[str, torch.Tensor]], folder: Path) -> dict[str, Any]:
    """Write tensors as files of some 128 MB; return the check sum of each."""
    sums: dict[str, int] = {}
    shard: dict[str, torch.Tensor] = {}
    number = 0

    def flush() -> None:
        nonlocal number
        if shard:
            number += 1
            save_file(shard, folder / f"base-{number:05d}.safetensors")
            shard.clear()

    for name, tensor in tensors:
        shard[name] = tensor.cpu().contiguous()
        sums[name] = _check_sum(shard[name])
        if sum(piece.nbytes for piece in shard.values()) >= SHARD_BYTES:
            flush()
    flush()
    return {"tensors": sums}


def _kept(entry: Entry) -> Tensors:
    """The tensors of an entry, checked as they are read. Raises DamagedError where one is not what was written."""
    sums = entry.manifest["tensors"]

    def read(handle: Any, name: str) -> torch.Tensor:
        tensor = handle.get_tensor(name)
        if _check_sum(tensor) != sums[name]:
            raise DamagedError(f"{entry.path}: {name} is not what was written")
        return tensor

    try:
        handles = [safe_open(file, framework="pt", backend="pread") for file in entry.files()]
        found = {name: Lazy(partial(read, handle, name)) for handle in handles for name in handle.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise DamagedError(f"{entry.path}: {error}") from None
    if found.keys() != sums.keys():
        raise DamagedError(f"{entry.path}: holds other tensors than were written")
    return found


def _check_sum(tensor: torch.Tensor) -> int:
    """XXH3 of the bytes, 64 bits: 16 GB/s on one core, so that every load can afford it (CRC-32: 2 GB/s)."""
    return xxhash.xxh3_64_intdigest(tensor.reshape(-1).view(torch.uint8).numpy().data)


def _note(line: str) -> None:
    """Said once on each machine."""
    if process.environment("LOCAL_RANK", "0") == "0":
        print(line, flush=True)


def main(words: list[str]) -> int:
    """Build the cache's entry for a `model` section, as JSON; the exit code says whether the base could be read."""
    try:
        model = Model.model_validate(json.loads(words[0]))
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        checkpoint = open_checkpoint(model, device)
        if checkpoint is not None:
            _ensure(model, checkpoint)
        return 0
    except (MistralDistError, OSError, ValueError, SafetensorError) as error:
        print(str(error).splitlines()[0], file=sys.stderr)
        return 1


if __name__ == "__main__":
    process.serve_parent()
    sys.exit(main(sys.argv[1:]))
