"""Where a run's processes go, and what they share out: what the user asked for, as one `accelerate launch` line.

One process without ZeRO, several under ZeRO-2, unless asked otherwise; on this machine alone, or on several nodes, each of which
starts its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from mistral_dist import assets
from mistral_dist.config import Recipe
from mistral_dist.errors import RecipeError
from mistral_dist.runtime import launcher, slurm
from mistral_dist.runtime.nodes import Nodes


@dataclass(frozen=True)
class Topology:
    """What the user asked for; None is for us to decide."""

    processes: int | None = None
    """On each node, with a GPU each where there are some."""
    gpus: int | None = None
    """The same, where no GPU is no answer."""
    zero: int | None = None
    offload: bool = False
    config: Path | None = None
    """An accelerate config of the user's own: it decides what is not asked for here, the port between machines included."""
    nodes: Nodes | None = None
    """None for this machine alone."""


ANY = Topology()
"""Nothing is asked for."""


def training_line(recipe: Recipe, words: Sequence[str], asked: Topology, module: str = "mistral_dist.train") -> launcher.Line:
    """The line that trains a recipe; `words` are its path and the overrides, as the workers will read them.

    Raises RecipeError for what cannot be.
    """
    zero = check_options(asked)
    gpus = launcher.visible_gpus()
    if asked.config is not None:
        if asked.gpus or asked.processes:
            processes_per_node(asked, gpus)
        return launcher.Line(
            config=asked.config, module=module, words=tuple(words), processes=asked.gpus or asked.processes,
            deepspeed=_deepspeed(zero, asked.offload), port=None, join_seconds=launcher.join_seconds(), gpus=gpus > 0,
        )  # fmt: skip
    nodes = asked.nodes
    count = processes_per_node(asked, gpus) * (nodes.count if nodes else 1)
    packs = recipe.train.global_batch_size
    if count > packs:
        fewer = f"use {packs} of them at most, or start a new run with a larger global batch"
        raise RecipeError(f"train.global_batch_size={packs}: cannot be shared by {count} processes; {fewer}")
    if zero is None:
        zero = 2 if count > 1 else 0
    name = ("multi_node" if nodes else "multi_gpu") if zero else "single_gpu" if count == 1 else "data_parallel"
    return launcher.Line(
        config=assets.find(f"configs/accelerate/{name}.yaml"), module=module, words=tuple(words), processes=count,
        deepspeed=_deepspeed(zero, asked.offload), nodes=nodes, port=nodes.port if nodes else 0,
        join_seconds=launcher.join_seconds() if nodes else None, gpus=gpus > 0,
    )  # fmt: skip


def evaluation_line(run: Path, words: Sequence[str], asked: Topology = ANY, module: str = "mistral_dist.evaluate") -> launcher.Line:
    """The line that evaluates a run, or asks it something, on this machine."""
    check_options(asked)
    gpus = launcher.visible_gpus()
    count = processes_per_node(asked, gpus)
    name = "single_gpu" if count == 1 else "data_parallel"
    return launcher.Line(
        config=assets.find(f"configs/accelerate/{name}.yaml"), module=module, words=(str(run), *words),
        processes=count, gpus=gpus > 0, saves=False,
    )  # fmt: skip


def processes_per_node(asked: Topology, gpus: int) -> int:
    """All visible GPUs; without any, two processes, so that what runs is what would run on two GPUs.

    Raises RecipeError for more than there are GPUs, and in a SLURM job that has none where nobody asked for CPU processes: it
    would hold its place for days.
    """
    count = asked.gpus or asked.processes
    if count is not None and count > gpus and (gpus or asked.gpus):
        option, seen = (
            "--gpus" if asked.gpus else "--processes",
            "no GPU is" if not gpus else f"only {gpus} GPU{'s are' if gpus > 1 else ' is'}",
        )
        raise RecipeError(
            f"{option} {count}: {seen} visible here; see CUDA_VISIBLE_DEVICES and nvidia-smi, in a container its own flag for GPUs"
        )
    if count is None and not gpus and slurm.job() is not None:
        raise RecipeError(
            f"SLURM job {slurm.job()}: no GPU is visible; ask for some (sbatch --gres=gpu:4 ...), or say with --processes N how many"
            " CPU processes each node is to run"
        )
    return count or gpus or 2


def _knows_deepspeed(config: Path) -> bool:
    try:
        found = yaml.safe_load(config.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"--config-file {config}: cannot be read as YAML ({' '.join(str(error).split())[:80]})") from None
    return isinstance(found, dict) and str(found.get("distributed_type")).upper().endswith("DEEPSPEED")


def check_options(asked: Topology) -> int | None:
    """The ZeRO stage that is asked for. Raises RecipeError for options that do not go together, on whatever machine."""
    if asked.processes and asked.gpus:
        raise RecipeError(
            "--processes and --gpus: both say how many; take one of them (launch/single_gpu.sh says --processes 1: use multi_gpu.sh)"
        )
    zero = _stage_of(asked)
    if asked.config is None:
        return zero
    if not asked.config.is_file():
        raise RecipeError(f"--config-file {asked.config}: no such file; configs/accelerate/ has some to start from")
    if asked.nodes is not None:
        raise RecipeError(
            "--config-file: not on several nodes (--nodes, or a SLURM step); mistral-dist says itself where they meet, with its own"
        )
    if zero == 0 and _knows_deepspeed(asked.config):
        raise RecipeError(f"--zero 0: {asked.config} starts DeepSpeed; take a config without it, or leave --config-file out")
    if zero and not _knows_deepspeed(asked.config):
        raise RecipeError(
            f"--zero {zero}: {asked.config} does not start DeepSpeed, and Accelerate would leave it out without a word;"
            " set distributed_type: DEEPSPEED there, with a deepspeed_config"
        )
    return zero


def _stage_of(asked: Topology) -> int | None:
    if asked.offload and asked.zero is None and asked.config is None:
        return 2
    if asked.offload and asked.zero not in (2, 3):
        stage = "" if asked.zero is None else f" with --zero {asked.zero}"
        raise RecipeError(f"--offload{stage}: the optimizer is offloaded under ZeRO-2 and 3 only; add --zero 2 or --zero 3")
    return asked.zero


def _deepspeed(zero: int | None, offload: bool) -> Path | None:
    """The DeepSpeed configuration; None without ZeRO."""
    return assets.find(f"configs/deepspeed/zero{zero}{'_offload' if offload else ''}.json") if zero else None
