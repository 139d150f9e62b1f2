"""Puts the faults into the modules that the worker will import from.

nan_loss, infinite_loss    [[step, slot], ...]: the loss of the micro-batch that begins with this slot
infinite_gradient          [[step, slot], ...]: that of this micro-batch, whose loss is finite
kill_in_save               [point, step]: rank 0 kills itself there while it writes checkpoint-<step>
huge_rate                  [step, ...]: the learning rate is 1 there
slow                       {rank: seconds}: how much longer each of its forwards takes
stop_in_forward            [rank, step, micro-step]: it sends itself SIGTERM before that forward
slow_save                  seconds: how much longer a checkpoint takes to be written
stop_in_validation         [step, batch]: rank 1 sends itself SIGTERM before that forward of that step's validation
hang_in_validation         [step, batch]: rank 1 goes no further there
kill_after_validation      step: rank 0 kills itself when it has written the line of that step's validation
memory                     {rank: tokens}: a longer forward of that rank is refused its memory, as by a GPU
card_bytes                 the GPU has so much memory
no_borders                 attention crosses from one example to the next
shifted_targets            each target is predicted one place too early
dead_gradient              one tensor of the adapter never gets a gradient
uphill                     the learning rate is negative
forgotten_moments          a run that goes on begins with moments of zero
"""

import json
import math
import os
import signal
import time
from typing import Any

import torch
import transformers.masking_utils

from mistral_dist import checkpoint, loss, model, optim, run
from mistral_dist.data import stream
from mistral_dist.runtime import engine, memory, shards
from tests.faults.killing import kill_in_save

FAULTS = json.loads(os.environ["FAULTS"])
now = [0, 0]

seed_noise, summed_loss, lr_at = engine.seed_noise, loss.summed_loss, optim.lr_at
get_device_properties = torch.cuda.get_device_properties
collate, build_trainable, scatter_moments = stream.collate, model.build_trainable, shards.scatter_moments
write_manifest = checkpoint._manifest


def noting(seed: int, step: int, slot: int) -> None:
    now[:] = [step + 1, slot]
    seed_noise(seed, step, slot)


def spoiled(*given: Any) -> Any:
    rank = os.environ.get("RANK", "0")
    time.sleep(FAULTS.get("slow", {}).get(rank, 0.0))
    if given[1].input_ids.shape[1] > FAULTS.get("memory", {}).get(rank, math.inf):
        raise torch.OutOfMemoryError("CUDA out of memory (a fault)")
    found = summed_loss(*given)
    if now in FAULTS.get("nan_loss", []):
        return found * float("nan")
    if now in FAULTS.get("infinite_gradient", []):
        found = found * 1
        found.register_hook(lambda gradient: gradient * math.inf)
    # with a gradient that is finite
    return found + float("inf") if now in FAULTS.get("infinite_loss", []) else found


def raised(step: int, steps: int, settings: Any) -> float:
    rate = 1.0 if step + 1 in FAULTS.get("huge_rate", []) else lr_at(step, steps, settings)
    return -rate if "uphill" in FAULTS else rate


def shifted(examples: Any) -> Any:
    made = collate(examples)
    return {**made, "predict_from": made["predict_from"] - 1}


def deadened(*given: Any) -> Any:
    built = build_trainable(*given)
    dead = next(parameter for name, parameter in built.named_parameters() if "lora_B" in name)
    dead.register_hook(torch.zeros_like)
    return built


class SmallCard:
    """A GPU's properties, with less memory."""

    total_memory = FAULTS.get("card_bytes")

    def __init__(self, card: Any) -> None:
        self._card = card

    def __getattr__(self, name: str) -> Any:
        return getattr(self._card, name)


def small_card(*given: Any, **named: Any) -> SmallCard:
    return SmallCard(get_device_properties(*given, **named))


def forgetful(parameters: Any, optimizer: Any, moments: Any, step: int) -> None:
    scatter_moments(parameters, optimizer, {name: torch.zeros_like(moment) for name, moment in moments.items()}, step)


def troubled(self: Any, phase: str, step: int | None = None, micro: int | None = None) -> None:
    arrive(self, phase, step, micro)
    if phase == "forward" and FAULTS.get("stop_in_forward") == [self.rank, step, micro]:
        os.kill(os.getpid(), signal.SIGTERM)
    if phase == "validation" and self.rank == 1:
        if FAULTS.get("stop_in_validation") == [step, micro]:
            os.kill(os.getpid(), signal.SIGTERM)
        if FAULTS.get("hang_in_validation") == [step, micro]:
            time.sleep(3600)


def sleepy(*given: Any) -> Any:
    time.sleep(FAULTS["slow_save"])
    return write_manifest(*given)


def deadly(self: Any, name: str, entry: dict[str, Any]) -> None:
    append(self, name, entry)
    if "eval" in entry and entry["step"] == FAULTS.get("kill_after_validation"):
        os.kill(os.getpid(), signal.SIGKILL)


arrive, append = engine.Runtime.at, run.RunDirectory.append
engine.Runtime.at, run.RunDirectory.append = troubled, deadly  # type: ignore[method-assign]
if "kill_in_save" in FAULTS and os.environ.get("RANK", "0") == "0":
    kill_in_save(*FAULTS["kill_in_save"])
if "slow_save" in FAULTS:
    checkpoint._manifest = sleepy
if "memory" in FAULTS:
    memory.refuses_in_time = lambda device: True
if "card_bytes" in FAULTS:
    torch.cuda.set_per_process_memory_fraction(FAULTS["card_bytes"] / get_device_properties(0).total_memory)
    torch.cuda.get_device_properties = small_card
if "no_borders" in FAULTS:
    transformers.masking_utils.find_packed_sequence_indices = lambda position_ids: None
if "shifted_targets" in FAULTS:
    stream.collate = shifted
if "dead_gradient" in FAULTS:
    model.build_trainable = deadened
if "forgotten_moments" in FAULTS:
    shards.scatter_moments = forgetful
engine.seed_noise, loss.summed_loss, optim.lr_at = noting, spoiled, raised
