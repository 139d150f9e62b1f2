"""The process of the debug mode that trains and looks: the steps of train.py under anomaly detection, with looks before and between.

    accelerate launch --config_file configs/accelerate/single_gpu.yaml -m mistral_dist.debug.worker RECIPE [section.field=value ...]

Findings go to debug.jsonl in the run directory, one a line; the first that is wrong ends it.
"""

import sys
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from mistral_dist.base import compute_dtype
from mistral_dist.config import Recipe
from mistral_dist.data.encode import Encoder
from mistral_dist.data.stream import Work
from mistral_dist.debug import FILE, findings
from mistral_dist.debug.blame import anomaly
from mistral_dist.debug.borders import borders, logits_of, mean_loss, pairable, still
from mistral_dist.debug.findings import Finding
from mistral_dist.ending import end, publish
from mistral_dist.entry import end_before_start, open_run
from mistral_dist.errors import FINISHED, STOPPED, MistralDistError, StopAgreed
from mistral_dist.model import adapter_parameters
from mistral_dist.run import RunDirectory
from mistral_dist.runtime.engine import Runtime
from mistral_dist.runtime.process import StopRequest
from mistral_dist.session import Session
from mistral_dist.train import join, load, train_on


class Wrong(Exception):
    """A finding that is not as it should be; it has been written down."""


def debug(recipe: Recipe, runtime: Runtime, run: RunDirectory) -> int:
    """Train and look; return FINISHED, or STOPPED where something is wrong or somebody asked."""

    def note(finding: Finding) -> None:
        run.append(FILE, asdict(finding))
        if not finding.ok:
            raise Wrong(finding.what)

    try:
        session, encoder = load(recipe, runtime, run)
    except StopAgreed as asked:
        return end_before_start(runtime, run, asked)
    try:
        _look_and_train(session, encoder, note)
    except (StopAgreed, Wrong) as halt:
        why = str(halt) if isinstance(halt, StopAgreed) else f"by what was found: {halt}"
        run.set_status("stopped", STOPPED, f"stopped {why}; the debug mode always begins anew")
        return STOPPED
    session.save(last=True)
    return end(session, FINISHED, publish(session, encoder.tokenizer))


def _look_and_train(session: Session, encoder: Encoder, note: Any) -> None:
    model, device = session.runtime.model, session.runtime.device
    work = coming(session)
    for finding in before_training(session, work, encoder):
        note(finding)
    before = mean_loss(model, work.batches, device)
    with watched_updates(session, note), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            with torch.autograd.detect_anomaly(check_nan=True):
                while not session.is_finished():
                    train_on(session)
        except RuntimeError as error:
            place, micro = session.runtime.place, session.runtime.place.micro or 1
            found = anomaly(error, str(place), [str(one.message) for one in told], model, coming(session).batches[micro - 1].to(device))
            if found is None:
                raise
            note(found)
    guard = session.progress.guard
    note(findings.descent(before, mean_loss(model, work.batches, device), session.progress.step, len(guard.untrained)))


def coming(session: Session) -> Work:
    """The work of the step that comes next."""
    stream = session.feed.stream
    with closing(stream.from_cursor(session.progress.cursor)) as steps:  # type: ignore[type-var]
        work = stream.agree(next(steps), session.runtime.sum)
    assert work is not None, "nobody is asked to stop here"
    return work


def before_training(session: Session, work: Work, encoder: Encoder) -> Iterator[Finding]:
    """What can be seen before a step is made."""
    recipe, model, device = session.recipe, session.runtime.model, session.runtime.device
    bare = session.runtime.bare_model
    with still(model):
        logits = logits_of(model, work.batches[0].to(device))
    yield findings.micro_batch(work.batches[0], bare.get_input_embeddings().num_embeddings, logits)
    yield findings.targets(work.batches[0], recipe.task, encoder)
    yield findings.trainable(bare)
    examples = pairable([findings.examples_in(batch) for batch in work.batches], recipe.data.max_length)
    yield borders(model, examples, device, compute_dtype(recipe.model, device))


@contextmanager
def watched_updates(session: Session, note: Any) -> Iterator[None]:
    """A look at gradients and memory just before the first two updates."""
    runtime, updates = session.runtime, 0
    parameters = adapter_parameters(runtime.bare_model)

    def look(*_: Any) -> None:
        nonlocal updates
        updates += 1
        if updates <= 2:
            note(findings.gradients(updates, parameters))
        if updates == 2:
            note(findings.memory(runtime.memory_parts(), runtime.memory_bytes(), runtime.device.type))

    handle = register_optimizer_step_pre_hook(look)
    try:
        yield
    finally:
        handle.remove()


def main(words: list[str]) -> int:
    """One worker: `RECIPE [section.field=value ...]`; return the exit code."""
    try:
        recipe = Recipe.load(words[0] if words else "", words[1:])
        with StopRequest() as stop:
            runtime = join(recipe, stop)
            with open_run(recipe, runtime) as run:
                code = debug(recipe, runtime, run)
            runtime.close()
        return code
    except MistralDistError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
