"""Adapter and optimizer state by parameter name: gathered from, and spread over, any ZeRO stage and number of ranks.

The state of AdamW is three things for each parameter: the parameter itself (float32, see model.py), its two moments, and
one step count. Without ZeRO they are whole on every rank. ZeRO-1 and 2 keep each rank's part of all parameters in one flat
tensor; ZeRO-3 cuts each parameter in equal parts, padded. Nothing here is specific to LoRA.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from mistral_dist.errors import CheckpointError

MOMENTS = ("exp_avg", "exp_avg_sq")


def gather_parameter(parameter: Any) -> torch.Tensor:
    """The whole parameter, float32, on the CPU. A collective: every rank calls it."""
    if hasattr(parameter, "ds_id"):
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(parameter).detach().cpu().reshape(parameter.ds_shape).clone()
    return parameter.detach().cpu().clone()


def scatter_parameters(parameters: Mapping[str, torch.nn.Parameter], optimizer: Any, values: Mapping[str, torch.Tensor]) -> None:
    """Put gathered parameters back, each rank its part, and the optimizer's own copies of them. A collective under ZeRO-3.

    `values`: float32 tensors of the parameters' whole shapes, by name. Raises CheckpointError where one is missing or of another shape.
    """
    for name, parameter in parameters.items():
        _scatter_parameter(parameter, _fitting(name, parameter, values))
    kept_whole = getattr(optimizer, "persistent_parameters", [])
    if kept_whole:
        # ZeRO-3 keeps small parameters whole on every rank, and gathers none that is there: let go of first, or a run that has gone
        # back computes its next forward with the adapter that it has left
        kept_whole[0].partition(kept_whole)
        kept_whole[0].all_gather(kept_whole)


def average_gradients(parameters: Sequence[torch.nn.Parameter], world_size: int) -> None:
    """Replace each rank's gradients by their mean over the ranks. A collective: one sum, in the order of the parameters.

    DistributedDataParallel would order its buckets anew after the first backward, and with them, on three ranks or more, the
    order in which the elements are summed: the first step after a start would round otherwise than the same step in a run under way.
    """
    gradients = [parameter.grad if parameter.grad is not None else torch.zeros_like(parameter) for parameter in parameters]
    flat = torch.cat([gradient.flatten() for gradient in gradients]) / world_size
    torch.distributed.all_reduce(flat)
    for parameter, mean in zip(parameters, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        parameter.grad = mean.view_as(parameter)


def own_elements(parameter: Any, rank: int) -> torch.Tensor:
    """What a rank holds of a parameter: under ZeRO-3 its part, else all of it. Without the padding, which is uninitialised memory."""
    part = getattr(parameter, "ds_tensor", None)
    if part is None:
        return parameter.detach()
    return part.detach().flatten()[: max(0, parameter.ds_numel - rank * part.numel())]


def held_bytes(parameters: Iterable[Any]) -> tuple[int, int]:
    """Bytes of these parameters that this rank has allocated, and bytes that they have when whole."""
    held = whole = 0
    for parameter in parameters:
        part = getattr(parameter, "ds_tensor", None)
        held += parameter.untyped_storage().nbytes() + (0 if part is None else part.untyped_storage().nbytes())
        whole += getattr(parameter, "ds_numel", parameter.numel()) * parameter.element_size()
    return held, whole


def create_state(optimizer: Any, step: int) -> None:
    """Give AdamW the state that it would otherwise only make in its first update, with the step count already right.

    A run may be saved before there is any update: its first step was not finite, or it was asked to stop.
    """
    is_zero = not isinstance(optimizer, torch.optim.Optimizer)
    inner = optimizer.optimizer if is_zero else optimizer
    for tensor in _state_tensors(optimizer) if is_zero else [p for group in inner.param_groups for p in group["params"]]:
        if inner.state.get(tensor):  # in the middle of a run: ZeRO holds links to these very tensors
            inner.state[tensor]["step"].fill_(float(step))
            continue
        on = tensor.device if inner.defaults.get("fused") else "cpu"
        inner.state[tensor] = {
            "step": torch.tensor(float(step), dtype=torch.float32, device=on),
            **{moment: torch.zeros_like(tensor, dtype=torch.float32, requires_grad=False) for moment in MOMENTS},
        }
    if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        # ZeRO-1 and 2 link parameters to their part of the flat state after each step; here it is needed before the first
        optimizer._lazy_init_hp_params_optimizer_state()


def gather_moments(parameters: Mapping[str, torch.nn.Parameter], optimizer: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """(`name.exp_avg`, whole tensor) and so on, float32, on the CPU. A collective: every rank iterates to the end."""
    for name, parameter in parameters.items():
        for moment in MOMENTS:
            yield f"{name}.{moment}", _gather_moment(parameter, optimizer, moment)


def scatter_moments(parameters: Mapping[str, torch.nn.Parameter], optimizer: Any, moments: Mapping[str, torch.Tensor], step: int) -> None:
    """Put gathered moments back, each rank its part, and set AdamW's step count.

    Raises CheckpointError where a moment is missing or of another shape.
    """
    create_state(optimizer, step)
    for name, parameter in parameters.items():
        for moment in MOMENTS:
            _scatter_moment(parameter, optimizer, moment, _fitting(f"{name}.{moment}", parameter, moments))


def _fitting(name: str, parameter: Any, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
    value = values.get(name)
    shape = getattr(parameter, "ds_shape", parameter.shape)
    if value is None or value.shape != shape:
        found = None if value is None else tuple(value.shape)
        raise CheckpointError(f"training state {name}: expected shape {tuple(shape)}, found {found}")
    return value


def _own_part(parameter: Any, value: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a whole tensor under ZeRO-3: equal parts, the last padded with zeros."""
    part = parameter.ds_tensor.numel()
    rank = torch.distributed.get_rank()
    padded = torch.zeros(part * torch.distributed.get_world_size(), dtype=torch.float32)
    padded[: value.numel()] = value.flatten()
    return padded[rank * part : (rank + 1) * part].to(parameter.ds_tensor.device)


def _scatter_parameter(parameter: Any, value: torch.Tensor) -> None:
    if hasattr(parameter, "ds_id"):
        from deepspeed.utils import safe_set_local_fp32_param

        # the library's own setter of whole tensors fails where the ranks do not divide the elements
        local = _own_part(parameter, value)
        parameter.ds_tensor.data.copy_(local)
        safe_set_local_fp32_param(parameter, local)
        return
    parameter.data.copy_(value)
    if hasattr(parameter, "_hp_mapping"):
        from deepspeed.utils import safe_set_full_fp32_param

        safe_set_full_fp32_param(parameter, value.to(parameter.device))


def _gather_moment(parameter: Any, optimizer: Any, moment: str) -> torch.Tensor:
    if hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):
        from deepspeed.utils import safe_get_full_optimizer_state

        shape = getattr(parameter, "ds_shape", parameter.shape)
        return safe_get_full_optimizer_state(parameter, moment).detach().cpu().reshape(shape).clone()
    return optimizer.state[parameter][moment].detach().cpu().clone()


def _scatter_moment(parameter: Any, optimizer: Any, moment: str, value: torch.Tensor) -> None:
    if hasattr(parameter, "ds_id"):
        from deepspeed.utils import safe_set_local_optimizer_state

        safe_set_local_optimizer_state(parameter, _own_part(parameter, value), moment)
    elif hasattr(parameter, "_hp_mapping"):
        from deepspeed.utils import safe_set_full_optimizer_state

        safe_set_full_optimizer_state(parameter, value.to(parameter.device), moment)
    else:
        optimizer.state[parameter][moment].copy_(value)


def _state_tensors(zero: Any) -> list[torch.Tensor]:
    """The flat float32 tensors that DeepSpeed hands to the torch optimizer: ZeRO-3's, else ZeRO-1's and 2's."""
    flat = getattr(zero, "fp32_partitioned_groups_flat", None)
    return list(flat if flat is not None else zero.single_partition_of_fp32_groups)
