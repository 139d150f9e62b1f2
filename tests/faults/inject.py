"""Puts the faults into the modules that the worker will import from.

nan_loss, infinite_loss    [[step, slot], ...]: the loss of the micro-batch that begins with this slot
kill_in_save               [point, step]: rank 0 kills itself there while it writes checkpoint-<step>
huge_rate                  [step, ...]: the learning rate is 1 there
slow                       {rank: seconds}: how much longer each of its forwards takes
stop_in_validation         [step, batch]: rank 1 sends itself SIGTERM before that forward of that step's validation
hang_in_validation         [step, batch]: rank 1 goes no further there
kill_after_validation      step: rank 0 kills itself when it has written the line of that step's validation
"""

import json
import os
import signal
import time
from typing import Any

from mistral_dist import loss, optim, run
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


def troubled(self: Any, phase: str, step: int | None = None, micro: int | None = None) -> None:
    arrive(self, phase, step, micro)
    if phase == "validation" and self.rank == 1:
        if FAULTS.get("stop_in_validation") == [step, micro]:
            os.kill(os.getpid(), signal.SIGTERM)
        if FAULTS.get("hang_in_validation") == [step, micro]:
            time.sleep(3600)


def deadly(self: Any, name: str, entry: dict[str, Any]) -> None:
    append(self, name, entry)
    if "eval" in entry and entry["step"] == FAULTS.get("kill_after_validation"):
        os.kill(os.getpid(), signal.SIGKILL)


arrive, append = engine.Runtime.at, run.RunDirectory.append
engine.Runtime.at, run.RunDirectory.append = troubled, deadly  # type: ignore[method-assign]
if "kill_in_save" in FAULTS and os.environ.get("RANK", "0") == "0":
    kill_in_save(*FAULTS["kill_in_save"])
engine.seed_noise, loss.summed_loss, optim.lr_at = noting, spoiled, raised
