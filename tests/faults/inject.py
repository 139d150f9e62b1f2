"""Puts the faults into the modules that the worker will import from.

nan_loss, infinite_loss    [[step, slot], ...]: the loss of the micro-batch that begins with this slot
kill_in_save               [point, step]: rank 0 kills itself there while it writes checkpoint-<step>
huge_rate                  [step, ...]: the learning rate is 1 there
slow                       {rank: seconds}: how much longer each of its forwards takes
"""

import json
import os
import time
from typing import Any

from mistral_dist import loss, optim
from mistral_dist.runtime import engine
from tests.faults.killing import kill_in_save

FAULTS = json.loads(os.environ["FAULTS"])
now = [0, 0]

seed_noise, summed_loss, lr_at = engine.seed_noise, loss.summed_loss, optim.lr_at


def noting(seed: int, step: int, slot: int) -> None:
    now[:] = [step + 1, slot]
    seed_noise(seed, step, slot)


def spoiled(*given: Any) -> Any:
    time.sleep(FAULTS.get("slow", {}).get(os.environ.get("RANK", "0"), 0.0))
    found = summed_loss(*given)
    if now in FAULTS.get("nan_loss", []):
        return found * float("nan")
    # with a gradient that is finite
    return found + float("inf") if now in FAULTS.get("infinite_loss", []) else found


def raised(step: int, steps: int, settings: Any) -> float:
    return 1.0 if step + 1 in FAULTS.get("huge_rate", []) else lr_at(step, steps, settings)


if "kill_in_save" in FAULTS and os.environ.get("RANK", "0") == "0":
    kill_in_save(*FAULTS["kill_in_save"])
engine.seed_noise, loss.summed_loss, optim.lr_at = noting, spoiled, raised
