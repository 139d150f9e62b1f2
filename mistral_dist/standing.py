"""How a run stands: started, waiting for its workers, in the queue of a scheduler, training, or over."""

import time
from datetime import UTC, datetime
from typing import Any

from mistral_dist.display import eta, facts, following, say, validation_words
from mistral_dist.run import STARTING, RunDirectory, holder
from mistral_dist.runtime import slurm
from mistral_dist.runtime.launcher import join_seconds

QUEUE_EVERY = 5.0
"""Seconds between two questions to a scheduler, which serves many."""
JOIN_SECONDS, START_SECONDS = 600, 300
"""Nodes wait for each other, and need that to start beside; loading does not count, by then the workers are there."""


def standing(run: RunDirectory) -> Any:
    """A table for the terminal. Raises RunError where there is no run."""
    if run.status() is None:
        run.recipe()
    state, last, writer = _state(run), run.recent_metrics(1), holder(run.path)
    rows = [("run", run.path), ("state", state["state"]), ("message", state["message"])]
    if state.get("job"):
        rows.append(("job", f"SLURM {state['job']}: {slurm.state(state['job']) or 'the scheduler says nothing of it'}"))
    if state.get("launches", 1) > 1:
        rows.append(("restarts", state["launches"] - 1))
    if state.get("steps"):
        rows.append(("step", f"{state['step']} of {state['steps']}, last checkpoint {state['checkpoint'] or 'none'}"))
    if last:
        told = "not trained" if last[0]["loss"] is None else f"{last[0]['loss']:.4f}"
        speed = last[0]["tokens_per_second"]
        rows.append(("loss", f"{told} at step {last[0]['step']}{'' if speed is None else f', {speed:,.0f} tokens/s'}"))
    validation = run.last_validation()
    if validation:
        rows.append(("validation", f"loss {validation_words(validation)}"))
    remaining = eta(run) if writer is not None else None
    if remaining is not None:
        rows.append(("ETA", remaining))
    return facts([*rows, ("writer", writer or "none")])


def follow_to_the_end(run: RunDirectory) -> None:
    """Show how the run goes on; also while it has not begun, or waits in the queue."""
    if run.status() is None:
        say(f"{run.path}: nothing there yet; waiting for it to begin")
        while run.status() is None:
            time.sleep(0.5)
    with following(run) as tick:
        while holder(run.path) is not None or _is_starting(run) or _is_queued(run):
            tick()
            time.sleep(0.5)


def _state(run: RunDirectory) -> dict[str, Any]:
    """The status, or what is the matter where it has been left behind."""
    found = run.status() or {"state": "never started", "message": ""}
    if _is_starting(run):
        return {**found, "state": "starting", "message": f"its workers are not there yet (log: {run.log})"}
    if found["state"] == "running" and holder(run.path) is None:
        return {**found, "state": "interrupted", "message": "ended without a word; run the same command to go on"}
    return found


def _is_starting(run: RunDirectory) -> bool:
    """Whether workers are waited for, as far as can be told: whoever waits for them may have been killed."""
    status = run.status() or {}
    if status.get("message") != STARTING:
        return False
    age = (datetime.now(UTC) - datetime.fromisoformat(status["updated"])).total_seconds()
    return age < (join_seconds() or JOIN_SECONDS) + START_SECONDS


def _is_queued(run: RunDirectory) -> bool:
    """Whether the scheduler will go on with a run that has stopped, or does not answer. Asked every few seconds at most."""
    status = run.status() or {}
    job = status.get("job")
    if job is None or status["state"] == "finished":
        return False
    time.sleep(QUEUE_EVERY)
    found = slurm.state(job)
    return found is None or found.split(" ")[0] in slurm.ALIVE
