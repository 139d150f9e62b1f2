"""Fine-tuning, from the last good checkpoint (or the base model) to the last step of the recipe.

Started by `mistral-dist train`, or directly:

    accelerate launch --config_file configs/accelerate/multi_gpu.yaml -m mistral_dist.train RECIPE [section.field=value ...]
"""

import math
import sys
import time
from collections.abc import Sequence
from contextlib import suppress

from mistral_dist.runtime.process import StopRequest, die_with_launcher, environment

STOP = StopRequest()
if __name__ == "__main__":
    # before anything else: torch takes seconds to import, in which a signal would end this process without a word, and the
    # end of its launcher would go unnoticed
    STOP.__enter__()
    die_with_launcher()

import torch

from mistral_dist.checkpoint import versions
from mistral_dist.config import Recipe, digest
from mistral_dist.data.encode import Encoder, load_encoder
from mistral_dist.data.feed import open_feed
from mistral_dist.data.stream import Work
from mistral_dist.ending import end, publish
from mistral_dist.entry import end_before_start, note_failure, open_run
from mistral_dist.errors import FINISHED, STOPPED, DataError, MistralDistError, RunError, StopAgreed
from mistral_dist.loss import refusing_infinity, summed_loss
from mistral_dist.model import scoring
from mistral_dist.optim import lr_at
from mistral_dist.run import RunDirectory, holder
from mistral_dist.runtime.drift import code_fingerprint, recipe_facts
from mistral_dist.runtime.engine import Runtime, seed_noise
from mistral_dist.runtime.watch import VALIDATION
from mistral_dist.session import Session
from mistral_dist.step import StepResult
from mistral_dist.validation import Measured


def train(recipe: Recipe, runtime: Runtime, run: RunDirectory) -> int:
    """Train to the end, or until the ranks agree to stop; return FINISHED or STOPPED."""
    try:
        session, encoder = load(recipe, runtime, run)
    except StopAgreed as asked:
        return end_before_start(runtime, run, asked)

    stopped = ""
    try:
        while not session.is_finished():
            train_on(session)
    except StopAgreed as asked:
        # its words alone: it holds all that the forward has made, for which there may be no room beside a save
        stopped = str(asked)

    if stopped:
        # in the middle of a step, which is not made: it will be done again
        session.say(f"stopping {stopped}; left off at {runtime.place}")
        session.save(last=True)
        return end(session, STOPPED, stopped)

    session.save(last=True)
    return end(session, FINISHED, publish(session, encoder.tokenizer))


def load(recipe: Recipe, runtime: Runtime, run: RunDirectory) -> tuple[Session, Encoder]:
    """What training begins with. Raises StopAgreed between two stages where a rank was asked to stop."""
    encoder = load_encoder(recipe)
    runtime.agree_to_go_on()
    feed = open_feed(recipe, encoder, runtime.rank, runtime.world_size)
    runtime.agree_to_go_on()
    return Session.start(recipe, runtime, run, feed), encoder


def train_on(session: Session) -> None:
    """Train from where the run stands to its last step, or until it has to go back or the validations end it."""
    conclude(session)  # a stop may have come between a step and what follows it
    if session.is_finished():
        return
    stream = session.feed.stream
    for own in stream.from_cursor(session.progress.cursor, session.runtime.is_asked):
        try:
            work = stream.agree(own, session.runtime.sum)
        except DataError:  # on all ranks alike
            session.note_drops(own)
            raise
        if work is None:  # on all ranks alike, too: one of them is asked to stop while it waits for its data
            session.runtime.agree_to_go_on()
            break
        result = pass_over(session, work) if session.passes_over(work) else step(session, work)
        session.advance(work, result)
        trouble = session.trouble()
        if trouble is not None:
            session.go_back(trouble)
            break
        conclude(session)
        if session.is_finished():
            break


def conclude(session: Session) -> None:
    """What follows a step where it is due: a validation, a checkpoint."""
    if session.is_validation_due():
        session.note_validation(validate(session))
    if session.is_checkpoint_due():
        session.save()


def validate(session: Session) -> Measured:
    """The mean loss over all target tokens of the validation examples, to the last bit the same however they are shared out.

    Nothing in it is random, and it leaves no trace in what is trained. Raises StopAgreed between two batches, where any rank was asked
    to stop: then it is taken by the next launch.
    """
    runtime, held_out, number = session.runtime, session.feed.validation, session.progress.step
    assert held_out is not None, "the feed has something to validate on, or has refused"
    started = time.monotonic()
    sums: list[float] = []
    with scoring(runtime.bare_model) as model:
        for count, batch in enumerate(held_out.batches(), 1):
            runtime.check_stop()
            runtime.at(VALIDATION, number, count)
            runtime.packs = batch.packs
            sums.append(float(summed_loss(model, batch.to(runtime.device))))
    runtime.at(VALIDATION, number)
    # summed without rounding: the order, and so the number of ranks, is of no account
    everywhere = [loss for rank in runtime.gather(sums) for loss in rank]
    total = math.fsum(everywhere) if all(map(math.isfinite, everywhere)) else math.nan
    runtime.at("between steps", number)
    return Measured(total / held_out.targets, held_out.targets, held_out.examples, time.monotonic() - started)


def step(session: Session, work: Work) -> StepResult:
    """One optimizer step in which every target token of the global batch counts the same, or as much as its label weighs.

    The sum of their weights is known on every rank before the first forward: from the plan, or agreed on by the lanes. So
    each micro-batch gives its share of the mean, loss sum / weight, and nothing has to be rescaled afterwards.
    """
    runtime, recipe, number = session.runtime, session.recipe, work.step + 1
    rate = lr_at(work.step, session.steps, recipe.optim)
    runtime.set_learning_rate(rate)
    losses: list[torch.Tensor] = []
    for micro, batch in enumerate(work.batches, 1):
        seed_noise(recipe.train.seed, work.step, batch.slot)
        with runtime.micro_step(number, micro, batch.packs):
            loss = summed_loss(runtime.model, batch.to(runtime.device), recipe.train.label_smoothing_factor) / work.weight
            runtime.backward(refusing_infinity(loss))
        losses.append(loss.detach())
    runtime.at("update", number)
    grad_norm = runtime.finish_step()
    own = torch.stack(losses).tolist()
    (mean,) = runtime.sum([math.fsum(own) if all(map(math.isfinite, own)) else math.nan])
    runtime.at("between steps", number)
    return StepResult(mean, grad_norm, rate) if math.isfinite(grad_norm) else StepResult(None, None, rate, *to_blame(work, own, mean))


def to_blame(work: Work, losses: Sequence[float], mean: float) -> tuple[str, tuple[str, ...]]:
    """Why a step has no finite gradient, and this rank's examples that may have caused it; `losses`: one for each micro-batch."""
    is_loss = not math.isfinite(mean)
    batches = [batch for batch, loss in zip(work.batches, losses, strict=True) if not (is_loss and math.isfinite(loss))]
    ids = tuple(id for batch in batches for _, ids in batch.ids for id in ids)
    return f"the {'loss' if is_loss else 'gradient'} is not finite", ids


def pass_over(session: Session, work: Work) -> StepResult:
    """A step that leaves everything as it is."""
    session.runtime.agree_to_go_on()
    return StepResult(None, None, lr_at(work.step, session.steps, session.recipe.optim), "the run went back, and passes it over")


def main(words: list[str]) -> int:
    """One worker: `RECIPE [section.field=value ...]`; return the exit code."""
    try:
        recipe = Recipe.load(words[0] if words else "", words[1:])
        with STOP as stop:
            runtime = join(recipe, stop)
            with open_run(recipe, runtime) as run:
                code = train(recipe, runtime, run)
            runtime.close()
        return code
    except MistralDistError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code


def join(recipe: Recipe, stop: StopRequest) -> Runtime:
    """Join the other ranks; why that cannot be is noted in the run's status, unless another process writes there."""
    try:
        runtime = Runtime(recipe, stop)
        launch = {
            "the sharding": runtime.sharding,
            "the DeepSpeed configuration": digest(runtime.deepspeed),
            "--nodes": environment("GROUP_WORLD_SIZE", "1"),  # torchrun's word for it
        }
        runtime.refuse_drift({"the code of mistral-dist": code_fingerprint(), **launch, **versions(), **recipe_facts(recipe)})
        return runtime
    except Exception as error:
        with suppress(OSError, RunError):  # a lease that cannot be read may be another's
            if holder(recipe.run_dir) is None:
                note_failure(RunDirectory(recipe.run_dir), error)
        raise


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
