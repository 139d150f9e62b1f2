"""Fine-tuning, from the last good checkpoint (or the base model) to the last step of the recipe.

Started by `mistral-dist train`, or directly:

    accelerate launch --config_file configs/accelerate/multi_gpu.yaml -m mistral_dist.train RECIPE [section.field=value ...]
"""

import math
import sys

import torch

from mistral_dist.config import Recipe
from mistral_dist.data.encode import load_encoder
from mistral_dist.data.feed import open_feed
from mistral_dist.data.stream import Work
from mistral_dist.errors import FINISHED, STOPPED, MistralDistError, TrainingError
from mistral_dist.loss import summed_loss
from mistral_dist.optim import lr_at
from mistral_dist.run import RunDirectory, holder
from mistral_dist.runtime.engine import Runtime, seed_noise
from mistral_dist.runtime.process import StopRequest
from mistral_dist.session import Session, StepResult, note_failure, open_run


def train(recipe: Recipe, runtime: Runtime, run: RunDirectory, stop: StopRequest) -> int:
    """Train to the end, or to a stop request; return FINISHED or STOPPED."""
    encoder = load_encoder(recipe)
    feed = open_feed(recipe, encoder, runtime.rank, runtime.world_size)
    session = Session.start(recipe, runtime, run, feed)

    for own in feed.stream.from_cursor(session.progress.cursor):
        work = feed.stream.agree(own, runtime.sum)
        result = step(runtime, work, lr_at(work.step, session.steps, recipe.optim), recipe.train.seed, stop)
        session.advance(work, result)
        if result.stop:
            break
        if session.is_checkpoint_due():
            session.save()

    session.save(last=True)
    if not session.is_finished():
        return session.end(STOPPED)
    session.publish_adapter(encoder.tokenizer)
    return session.end(FINISHED)


def step(runtime: Runtime, work: Work, rate: float, seed: int, stop: StopRequest) -> StepResult:
    """One optimizer step in which every target token of the global batch counts the same.

    The number of targets is known on every rank before the first forward: from the plan, or agreed on by the lanes. So
    each micro-batch gives its share of the mean, loss sum / targets, and nothing has to be rescaled afterwards.
    """
    runtime.set_learning_rate(rate)
    total = torch.zeros((), device=runtime.device)
    for batch in work.batches:
        seed_noise(seed, work.step, batch.slot)
        with runtime.micro_step():
            loss = summed_loss(runtime.model, batch.to(runtime.device)) / work.targets
            runtime.backward(loss)
        total += loss.detach()
    grad_norm = runtime.finish_step()
    mean, stops = runtime.sum([float(total), float(stop.signal is not None)])
    if not (math.isfinite(mean) and math.isfinite(grad_norm)):
        raise TrainingError(f"step {work.step + 1}: loss {mean}, gradient norm {grad_norm}; lower optim.learning_rate in a new run")
    return StepResult(mean, grad_norm, rate, stops > 0)


def main(words: list[str]) -> int:
    """One worker: `RECIPE [section.field=value ...]`; return the exit code."""
    try:
        recipe = Recipe.load(words[0] if words else "", words[1:])
        with StopRequest() as stop:
            runtime = join(recipe)
            with open_run(recipe, runtime) as run:
                code = train(recipe, runtime, run, stop)
            runtime.close()
        return code
    except MistralDistError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code


def join(recipe: Recipe) -> Runtime:
    """Join the other ranks; why that cannot be is noted in the run's status, unless another process writes there."""
    try:
        return Runtime(recipe)
    except Exception as error:
        if holder(recipe.run_dir) is None:
            note_failure(RunDirectory(recipe.run_dir), error)
        raise


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
