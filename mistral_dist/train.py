"""Fine-tuning, from the last good checkpoint (or the base model) to the last step of the recipe.

Started by `mistral-dist train`, or directly:

    accelerate launch --config_file configs/accelerate/multi_gpu.yaml -m mistral_dist.train RECIPE [section.field=value ...]
"""

import math
import sys

import torch

from mistral_dist.checkpoint import versions
from mistral_dist.config import Recipe
from mistral_dist.data.encode import Encoder, load_encoder
from mistral_dist.data.feed import open_feed
from mistral_dist.data.stream import Work
from mistral_dist.errors import FINISHED, STOPPED, MistralDistError, StopAgreed, TrainingError
from mistral_dist.loss import summed_loss
from mistral_dist.optim import lr_at
from mistral_dist.run import RunDirectory, holder
from mistral_dist.runtime.drift import code_fingerprint, recipe_facts
from mistral_dist.runtime.engine import Runtime, seed_noise
from mistral_dist.runtime.process import StopRequest
from mistral_dist.session import Session, StepResult, end_before_start, note_failure, open_run


def train(recipe: Recipe, runtime: Runtime, run: RunDirectory) -> int:
    """Train to the end, or until the ranks agree to stop; return FINISHED or STOPPED."""
    try:
        session, encoder = load(recipe, runtime, run)
    except StopAgreed as asked:
        return end_before_start(runtime, run, asked)

    try:
        for own in session.feed.stream.from_cursor(session.progress.cursor):
            work = session.feed.stream.agree(own, runtime.sum)
            result = step(runtime, work, lr_at(work.step, session.steps, recipe.optim), recipe.train.seed)
            session.advance(work, result)
            if session.is_checkpoint_due():
                session.save()
    except StopAgreed as asked:
        # in the middle of a step, which is not made: it will be done again
        session.say(f"stopping {asked}; left off at {runtime.place}")
        session.save()
        return session.end(STOPPED, str(asked))

    session.save()
    session.publish_adapter(encoder.tokenizer)
    return session.end(FINISHED)


def load(recipe: Recipe, runtime: Runtime, run: RunDirectory) -> tuple[Session, Encoder]:
    """What training begins with. Raises StopAgreed between two stages where a rank was asked to stop."""
    encoder = load_encoder(recipe)
    runtime.agree_to_go_on()
    feed = open_feed(recipe, encoder, runtime.rank, runtime.world_size)
    runtime.agree_to_go_on()
    return Session.start(recipe, runtime, run, feed), encoder


def step(runtime: Runtime, work: Work, rate: float, seed: int) -> StepResult:
    """One optimizer step in which every target token of the global batch counts the same.

    The number of targets is known on every rank before the first forward: from the plan, or agreed on by the lanes. So
    each micro-batch gives its share of the mean, loss sum / targets, and nothing has to be rescaled afterwards.
    """
    runtime.set_learning_rate(rate)
    total = torch.zeros((), device=runtime.device)
    for micro, batch in enumerate(work.batches, 1):
        seed_noise(seed, work.step, batch.slot)
        with runtime.micro_step(work.step + 1, micro, batch.packs):
            loss = summed_loss(runtime.model, batch.to(runtime.device)) / work.targets
            runtime.backward(loss)
        total += loss.detach()
    runtime.at("update", work.step + 1)
    grad_norm = runtime.finish_step()
    (mean,) = runtime.sum([float(total)])
    if not (math.isfinite(mean) and math.isfinite(grad_norm)):
        raise TrainingError(f"step {work.step + 1}: loss {mean}, gradient norm {grad_norm}; lower optim.learning_rate in a new run")
    runtime.at("between steps", work.step + 1)
    return StepResult(mean, grad_norm, rate)


def main(words: list[str]) -> int:
    """One worker: `RECIPE [section.field=value ...]`; return the exit code."""
    try:
        recipe = Recipe.load(words[0] if words else "", words[1:])
        with StopRequest() as stop:
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
        stage = {"ZeRO stage": str(runtime.zero_stage)}
        runtime.refuse_drift({"the code of mistral-dist": code_fingerprint(), **stage, **versions(), **recipe_facts(recipe)})
        return runtime
    except Exception as error:
        if holder(recipe.run_dir) is None:
            note_failure(RunDirectory(recipe.run_dir), error)
        raise


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
