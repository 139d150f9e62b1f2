"""ZeRO: what a DeepSpeed configuration may say, and what the recipe says in it."""

import datetime
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from mistral_dist.config import Recipe
from mistral_dist.errors import MachineError, RecipeError
from mistral_dist.runtime import process

OFFLOADS = ("device", "pin_memory")
"""What may stand in `offload_optimizer`. The rest is for disks, or for an optimizer that is compiled on the user's machine."""


def accumulation_steps(recipe: Recipe, world_size: int) -> int:
    """Micro-batches of each rank in a step. Raises RecipeError where there are more ranks than packs in a step."""
    packs, micro = recipe.train.global_batch_size, recipe.train.packs_per_forward
    if world_size > packs:
        raise RecipeError(
            f"train.global_batch_size={packs}: cannot be shared by {world_size} GPUs; use at most {packs} of them,"
            " or start a new run with a larger global batch"
        )
    per_rank = -(-packs // world_size)
    return -(-per_rank // micro)


def deepspeed_config(recipe: Recipe, world_size: int) -> dict[str, Any] | None:
    """The DeepSpeed JSON that `accelerate launch` named, its "auto" values filled in; None without DeepSpeed."""
    if process.environment("ACCELERATE_USE_DEEPSPEED", "false").lower() != "true":
        return None
    file = process.environment("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if file == "none":
        raise MachineError("the accelerate config names no deepspeed_config_file; use one of configs/accelerate/")
    try:
        config = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise MachineError(f"{file}: not a DeepSpeed configuration that can be read: {error}") from None
    return resolve_deepspeed(config, recipe, world_size, file)


def resolve_deepspeed(config: dict[str, Any], recipe: Recipe, world_size: int, file: str = "deepspeed config") -> dict[str, Any]:
    """Fill the "auto" values of a DeepSpeed configuration from the recipe; refuse what would change what is learned.

    Raises MachineError for a number that contradicts the recipe, and for a 16-bit engine: it would cast the adapter's
    master weights, and the packed 4-bit weights with them (model.py).
    """
    accumulation = accumulation_steps(recipe, world_size)
    decided = {
        "train_micro_batch_size_per_gpu": recipe.train.packs_per_forward,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": recipe.train.packs_per_forward * accumulation * world_size,
        "gradient_clipping": recipe.optim.max_grad_norm,
    }
    for key, value in decided.items():
        if config.get(key, "auto") not in ("auto", value):
            raise MachineError(f'{file}: {key} is {config[key]}, the recipe makes it {value}; write "auto"')
    for problem in _refused_in_deepspeed(config):
        raise MachineError(f"{file}: {problem}")
    return {**config, **decided}


CHANGES_NUMBERS = {
    *("communication_data_type", "prescale_gradients", "gradient_predivide_factor", "sparse_gradients"),
    *("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients", "zeropp_loco_param"),
    *("gradient_allreduce_op", "zenflow"),
    *("compression_training", "quantize_training", "progressive_layer_drop", "curriculum_learning", "data_efficiency"),
}
"""What DeepSpeed offers to round, leave out or reorder."""


def _refused_in_deepspeed(config: dict[str, Any]) -> Iterator[str]:
    """What a DeepSpeed configuration must not say, in words."""
    for key in ("bf16", "fp16", "torch_autocast", "amp"):
        if config.get(key, {}).get("enabled", False):
            yield f"{key} must not be enabled: the adapter is kept in float32; remove the section (model.dtype decides)"
    for key in ("optimizer", "scheduler"):
        if key in config:
            yield f"{key} is the recipe's to decide; remove the section"
    zero = config.get("zero_optimization", {})
    yield from _changes_numbers(config, zero)
    if zero.get("stage") not in (1, 2, 3):
        yield "zero_optimization.stage must be 1, 2 or 3; without ZeRO use configs/accelerate/data_parallel.yaml"
    yield from _refused_in_offload(config, zero)


def _changes_numbers(config: Mapping[str, Any], zero: Mapping[str, Any]) -> Iterator[str]:
    for section, place in ((config, ""), (zero, "zero_optimization.")):
        for key in sorted(section.keys() & CHANGES_NUMBERS):
            yield f"{place}{key} changes what is learned; remove it"
    if (config.get("data_types") or {}).get("grad_accum_dtype") not in (None, "fp32"):
        yield 'data_types.grad_accum_dtype changes what is learned; write "fp32"'


def _refused_in_offload(config: Mapping[str, Any], zero: Mapping[str, Any]) -> Iterator[str]:
    """What must not be said of what is kept in the machine's own memory."""
    parameters, optimizer = zero.get("offload_param") or {}, zero.get("offload_optimizer") or {}
    if parameters.get("device", "none") != "none":
        yield (
            "zero_optimization.offload_param: not supported; the base in 4 bits is small (4 GB for a 7B) and ZeRO-3 shards it,"
            " to bring it to the GPU layer by layer would only cost time; remove the section"
        )
    if not offloads(zero):
        return
    place = "zero_optimization.offload_optimizer"
    if optimizer["device"] != "cpu":
        yield f"{place}.device: must be cpu or none, not {optimizer['device']}"
    if zero.get("stage") == 1:
        yield f"{place}: goes with stage 2 or 3; use configs/deepspeed/zero2_offload.json or zero3_offload.json"
    for key in sorted(optimizer.keys() - set(OFFLOADS)):
        yield f"{place}.{key}: not known to work here; only {' and '.join(OFFLOADS)} may be set"
    if config.get("zero_force_ds_cpu_optimizer", True):
        yield (
            f'{place}: needs "zero_force_ds_cpu_optimizer": false; DeepSpeed would put its own optimizer in the place of the recipe\'s,'
            " which rounds differently and is compiled on the spot"
        )


def offloads(zero: Mapping[str, Any]) -> bool:
    """Whether a `zero_optimization` section has the optimizer's state kept in the machine's own memory."""
    return bool((zero.get("offload_optimizer") or {}).get("device", "none") != "none")


def without_compiled_collectives() -> None:
    """Have DeepSpeed use gloo on the CPU, as everything else does.

    It would compile shared-memory collectives of its own at its first start: that takes a compiler and half a minute.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def wait_as_long(timeout: datetime.timedelta) -> None:
    """Have the collectives of DeepSpeed's own groups, which it makes without one, give up after this time, as all others do."""
    distributed = torch.distributed.distributed_c10d
    for group in list(distributed._world.pg_map):
        distributed._set_pg_timeout(timeout, group)
