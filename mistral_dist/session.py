"""A run in training: what it is made of, how far it has come, and the traces it leaves on the disk.

The loop in train.py says when things happen; here is what they are.
"""

import time
from collections.abc import Sequence
from contextlib import suppress
from copy import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mistral_dist import checkpoint
from mistral_dist.base_cache import fingerprint
from mistral_dist.card import publishable
from mistral_dist.checkpoint import Progress, Snapshot
from mistral_dist.config import Recipe, leaves
from mistral_dist.data.cursor import Cursor
from mistral_dist.data.feed import Feed
from mistral_dist.data.stream import Drop, Work
from mistral_dist.errors import RunError, TrainingError
from mistral_dist.files import sweep
from mistral_dist.guards import Guard, Trouble, reach
from mistral_dist.hub import earlier_adapter
from mistral_dist.journal import reached
from mistral_dist.micro_batch import settled
from mistral_dist.model import adapter_parameters, build_trainable, choose_attention, packed_weights
from mistral_dist.optim import build_optimizer
from mistral_dist.run import RunDirectory
from mistral_dist.runtime import slurm
from mistral_dist.runtime.engine import Runtime
from mistral_dist.runtime.trackers import Trackers
from mistral_dist.saver import Saver
from mistral_dist.step import StepResult, told_untrained
from mistral_dist.validation import Measured, Validation

STATUS_EVERY = 1.0
"""Seconds between two updates of status.json, each of which is synced to the disk."""


@dataclass
class Session:
    """One rank's view of a run in training."""

    recipe: Recipe
    runtime: Runtime
    run: RunDirectory
    feed: Feed
    progress: Progress = Progress()
    saved: int = 0
    """The step of the newest checkpoint that is there or handed to the writer; 0 where there is none."""
    known: tuple[Guard, Validation] = (Guard(), Validation())
    """What that checkpoint remembers of losses and validations: more may be known of its step since."""
    clock: float = field(default_factory=time.monotonic)
    """When the step in progress began."""
    told: float = 0.0
    """When the status was last written."""
    peft_config: Any = None
    drops: list[tuple[int, int, Drop]] = field(default_factory=list)
    """(step, slot, drop) of this rank's rows since the last checkpoint."""
    base: str = ""
    """The fingerprint of the base's files."""

    def __post_init__(self) -> None:
        rules = self.recipe.checkpoint
        if self.recipe.train.load_best_model_at_end:
            rules = rules.model_copy(update={"save_best_limit": max(1, rules.save_best_limit)})
        self.keeps_best = rules.save_best_limit > 0
        fields = dict(leaves(publishable(self.recipe).model_dump(mode="json")))
        self.trackers = Trackers(self.recipe.log.trackers, self.run.path, self.recipe.log.project, fields, self.say)
        self.saver = Saver(self.run, rules, self.say, reach(self.recipe.train))
        self.runtime.is_writing = self.saver.is_writing

    @property
    def steps(self) -> int:
        """Steps of the run."""
        return self.feed.stream.steps

    @classmethod
    def start(cls, recipe: Recipe, runtime: Runtime, run: RunDirectory, feed: Feed) -> "Session":
        """Build the model, put into it what the last good checkpoint holds, and hand it to the ranks.

        Raises RunError where data, tokenizer or base are not those that the run began with.
        """
        session = cls(recipe, runtime, run, feed)
        session.base = runtime.on_each_machine(lambda: fingerprint(recipe.model))
        attention = choose_attention(recipe.model, runtime.device)
        data = {"the data": feed.fingerprint, "held-out data": feed.held_out}
        runtime.refuse_drift({"attention": attention, f"the base {recipe.model.name}": session.base, **data})
        found = session._find_checkpoint()
        if found is None:
            begun = earlier_adapter(recipe)
            runtime.refuse_drift({"the adapter to begin with": checkpoint.content_of(begun) if begun is not None else ""})
        ranks = f"{runtime.world_size} x {runtime.device.type}"
        session.say(f"{ranks}, {runtime.sharding}, attention {attention}, {session.steps} steps; loading the model")
        runtime.agree_to_go_on()
        model = session._load_model(attention, found)
        runtime.agree_to_go_on()
        session.recipe = settled(recipe, runtime, model, session.say)
        feed.stream.regroup(session.recipe.train.packs_per_forward)
        runtime.agree_to_go_on()
        session._shard(model)
        if found is not None:
            runtime.scatter_moments(checkpoint.load_moments(found), session.progress.updates)
        runtime.on_main(session._mark_start)
        runtime.agree_to_go_on()
        runtime.at("between steps")
        session.clock = time.monotonic()
        return session

    def advance(self, work: Work, result: StepResult) -> None:
        """Note a finished step in metrics, data order and status."""
        step, passed = work.step + 1, self.passes_over(work)
        before = self.progress.guard
        guard = before.after_passing(step) if passed else before.after(step, result.loss)
        self.progress = replace(self.progress, step=step, cursor=work.cursor, guard=guard)
        now = time.monotonic()
        seconds, self.clock = now - self.clock, now
        order = self._data_order(work) if self.recipe.log.data_order or result.untrained else []
        suspects = [id for rank in self.runtime.gather(result.suspects) for id in rank] if result.untrained else []
        self.drops += [(self.progress.step, slot, drop) for slot, drop in work.drops]
        if not self.runtime.is_main:
            return
        self.run.check_lease()
        saved = self.saver.settle()
        if saved:
            self.runtime.note_save(self.saver.seconds)
        metrics = self._metrics(work, result, seconds)
        self.run.append("metrics.jsonl", metrics)
        self.trackers.log(step, {f"train/{name}": value for name, value in metrics.items() if name != "step"})
        if self.recipe.log.data_order and not passed:
            self.run.append("data_order.jsonl", {"step": step, "ids": order})
        if result.untrained:
            self.run.append("untrained.jsonl", {"step": step, "because": result.untrained, "ids": order, "suspects": suspects})
        if saved or now - self.told > STATUS_EVERY:
            self.told = now
            self._tell_status()
        told = told_untrained(result.untrained, suspects) if result.loss is None else f"loss {result.loss:.4f}"
        self.say(f"step {step}/{self.steps}  {told}  {seconds:.2f} s")

    def passes_over(self, work: Work) -> bool:
        """Whether a step is not to be trained, because the run went back from it."""
        return self.progress.guard.passes_over(work.step + 1)

    def trouble(self) -> Trouble | None:
        """Why the run has to go back, if it has; the same on every rank."""
        return self.progress.guard.trouble(self.progress.step, self.recipe.train)

    def go_back(self, trouble: Trouble) -> None:
        """Return to the newest good checkpoint from before the trouble; what led to it will be passed over.

        A run that is killed before it is saved again meets the same trouble, and goes back again. Raises TrainingError, with a
        diagnosis, where there is no such checkpoint or the run went back too often.
        """
        step, train = self.progress.step, self.recipe.train
        remedy = "start another run (run.dir=...) with a lower optim.learning_rate"
        if self.progress.guard.refused:
            remedy += f", or look at the examples that {self.run.path / 'untrained.jsonl'} names"
        if len(self.progress.guard.windows) >= train.max_rewinds:
            often = "once" if train.max_rewinds == 1 else f"{train.max_rewinds} times"
            spent = f"the run went back {often} already (train.max_rewinds)" if train.max_rewinds else "train.max_rewinds=0 never goes back"
            raise TrainingError(f"step {step}: {trouble.because}; {spent}; {remedy}")
        self.runtime.on_main(self.saver.newest)
        target = self.runtime.on_main(lambda: self._retreat(trouble.first))
        if target is None:
            raise TrainingError(f"step {step}: {trouble.because}, and there is no checkpoint from before; {remedy}")
        found, _ = checkpoint.load_progress(target)
        self.known = found.guard, found.validation
        self.progress = replace(found, guard=self.progress.guard.after_going_back(found.guard, trouble))
        self.runtime.scatter_adapter(checkpoint.adapter_of(target, adapter_parameters(self.runtime.bare_model)))
        self.runtime.scatter_moments(checkpoint.load_moments(target), self.progress.updates)
        self.drops, self.saved, self.saver.step = [], self.progress.step, self.progress.step
        self.say(f"step {step}: {trouble.because}; back to {target.name}, steps {trouble.first} to {trouble.last} will be passed over")
        self.runtime.on_main(self._cut_back)
        self.clock = time.monotonic()

    def _retreat(self, before: int) -> Path | None:
        self.run.check_publishing()  # nothing is removed from a run that another process may have taken over
        return checkpoint.retreat(self.run.checkpoints, before=before)

    def _cut_back(self) -> None:
        self.run.check_publishing()
        self.run.cut_back(self.progress.reached)
        self.trackers.go_back(self.progress.step)

    def is_validation_due(self) -> bool:
        """Whether the adapter of this step is to be validated, and was not yet."""
        return self.progress.validation.is_due(self.progress.step, self.progress.updates, self.steps, self.recipe.train)

    def note_validation(self, found: Measured) -> None:
        """Note what a validation of this step's adapter showed: in what the run remembers, in metrics and log."""
        step = self.progress.step
        validation = self.progress.validation.after(step, self.progress.updates, found.loss, self.recipe.train)
        self.progress = replace(self.progress, validation=validation)
        if self.runtime.is_main:
            self.run.check_lease()
            self.run.append("metrics.jsonl", {"step": step, "eval": {**found.metrics(), "best_step": validation.best_step}})
            self.trackers.log(step, {f"eval/{name}": value for name, value in found.metrics().items()}, after=0.5)
        self.say(f"step {step}/{self.steps}  {validation.told()}  {found.seconds:.2f} s")
        self.clock = time.monotonic()

    def is_checkpoint_due(self) -> bool:
        """Whether this step is one of those that the recipe saves, or that of the best validation, where that is kept."""
        is_best = self.keeps_best and self.progress.validation.best_step == self.progress.step
        return is_best or self.progress.step % self.recipe.checkpoint.save_steps == 0

    def is_finished(self) -> bool:
        """Whether nothing is left to do: the last step is made, or the validations have shown that it is enough."""
        is_enough = self.progress.validation.is_enough(self.recipe.train)
        return (self.progress.step >= self.steps or is_enough) and not self.is_validation_due()

    def save(self, last: bool = False) -> None:
        """Hand a checkpoint of this step to the writer, unless it has it; of a launch, the `last` one is waited for by every rank.

        One is written anew where more is known of its step by now: it was saved at a stop within its validation, or the run went
        back to it.
        A save that cannot be written is told, and tried again at the next; the last one raises MachineError. Raises
        CheckpointError for an adapter that is not finite.
        """
        is_handed_over = self.progress.step == self.saved and self._knows() == self.known
        if is_handed_over and not last:
            return
        self.runtime.at("saving", self.progress.step)
        is_there = self.runtime.on_main(lambda: self.saver.newest() == self.progress.step and not self.saver.trouble)
        if not (is_handed_over and is_there):
            self._hand_over(in_haste=last)
            if last:
                self.runtime.on_main(self.saver.finish)
        self.runtime.at("between steps", self.progress.step)
        self.clock = time.monotonic()

    def _knows(self) -> tuple[Guard, Validation]:
        return self.progress.guard, self.progress.validation

    def _hand_over(self, *, in_haste: bool) -> None:
        started = time.monotonic()
        adapter, moments = self.runtime.gather_adapter(), self.runtime.gather_moments()
        everywhere = self.runtime.gather((self.progress.cursor, self.drops))
        self.saved, self.known, self.drops = self.progress.step, self._knows(), []
        if not self.runtime.is_main:
            return
        self._quarantine([drops for _, drops in everywhere])
        progress = replace(self.progress, cursor=Cursor.whole(cursor for cursor, _ in everywhere))
        metric = progress.validation.loss_at(progress.step)
        snapshot = Snapshot(progress, adapter, self.adapter_config(), moments, self._facts(), metric)
        self.saver.start(snapshot, time.monotonic() - started, in_haste=in_haste)

    def note_drops(self, work: Work | None) -> None:
        """Note the rows that a refused step has dropped, and those since the last checkpoint, before the run ends. A collective."""
        refused = [(work.step + 1, slot, drop) for slot, drop in work.drops] if work is not None else []
        everywhere = self.runtime.gather([*self.drops, *refused])
        if self.runtime.is_main:
            self._quarantine(everywhere)

    def _quarantine(self, everywhere: Sequence[Sequence[tuple[int, int, Drop]]]) -> None:
        # a slot is served by one rank, whose rows are in order: the file is the same on any number of ranks
        for step, _, drop in sorted((drop for drops in everywhere for drop in drops), key=lambda drop: drop[:2]):
            self.run.append("quarantine.jsonl", {"step": step, "place": drop.place, "reason": drop.reason, "because": drop.because})

    def _tell_status(self) -> None:
        """Say how far the run is; that it has failed, as another rank of this launch may have said since it began, stays."""
        message = f"training; {self.saver.trouble}" if self.saver.trouble else "training"
        progress = {"step": self.progress.step, "steps": self.steps, "checkpoint": name_of(self.saver.step)}
        with suppress(OSError):  # a folder that cannot be written does not end the training
            if (self.run.status() or {}).get("state") != "failed":
                self.run.set_status("running", None, message, **progress)

    def adapter_config(self) -> Any:
        """PEFT's configuration as it is saved: for inference, and the same bytes each time."""
        config = copy(self.peft_config)
        config.inference_mode = True
        config.target_modules = sorted(config.target_modules)
        config.modules_to_save = sorted(config.modules_to_save) if config.modules_to_save else None
        return config

    def say(self, line: str) -> None:
        """One plain line from rank 0."""
        if self.runtime.is_main:
            with suppress(OSError):  # the log may be on the same full disk
                print(line, flush=True)

    def _find_checkpoint(self) -> Path | None:
        """Rank 0 looks for the newest good checkpoint, and all take that one."""

        def look() -> Path | None:
            sweep(self.run.checkpoints)
            found, damaged = checkpoint.latest_good(self.run.checkpoints)
            if damaged and found is None:
                ways_out = "restore one, or start anew with --fresh"
                raise RunError(f"{self.run.checkpoints}: no checkpoint is whole ({'; '.join(damaged)}); {ways_out}")
            for line in damaged:
                self.say(f"{line}; passed over")
            return found

        found = self.runtime.on_main(look)
        if found is None:
            return None
        self.progress, facts = checkpoint.load_progress(found)
        self.saved = self.saver.step = self.progress.step
        self.known = self._knows()
        self._refuse_other(facts)
        self.say(f"going on from {found.name}")
        before = checkpoint.written_with(found)
        for name, version in checkpoint.versions().items():
            if before.get(name) != version:
                self.say(f"note: {name} was {before.get(name)} when the checkpoint was written, it is {version} now")
        return found

    def _load_model(self, attention: str, found: Path | None) -> Any:
        """The base with its adapter: that of the checkpoint, of an earlier run, or a new one."""
        model = build_trainable(self.recipe, self.runtime.device, attention)
        self.peft_config = model.peft_config["default"]
        begun = found / "adapter" if found is not None else earlier_adapter(self.recipe)
        if begun is not None:
            checkpoint.load_adapter(begun, adapter_parameters(model))
        return model

    def _shard(self, model: Any) -> None:
        """Hand the model and its optimizer to the ranks. Raises TrainingError where the base is not what it was, or not shared out."""
        runtime = self.runtime
        packed = runtime.byte_sum(packed_weights(model))
        trained = list(adapter_parameters(model).values())
        runtime.prepare(model, build_optimizer(trained, self.recipe.optim, fused=runtime.device.type == "cuda"))
        if runtime.byte_sum(packed_weights(runtime.bare_model)) != packed:
            raise TrainingError("the packed 4-bit weights changed while the model was sharded; use the versions of constraints.txt")
        runtime.refuse_unsharded([parameter for parameter in runtime.bare_model.parameters() if not parameter.requires_grad])

    def _refuse_other(self, facts: dict[str, Any]) -> None:
        """Raise RunError where what is trained on is not what the checkpoint was made with; before the model is loaded."""
        model = self.recipe.model
        base = f"files of the base {model.name}{f' than those in {model.path}' if model.path else ''}"
        for fact, what, now, instead in (
            ("encoding", "tokenizer or chat format", self.feed.encoding, ""),
            ("base", base, self.base, "put them back (model.path, or the hub's cache), "),
            ("data", f"data of {self.feed.place}", self.feed.fingerprint, ""),
            ("held_out", "held-out data", self.feed.held_out, ""),
        ):
            if facts.get(fact) != now:
                ways_out = f"{instead}start another run with run.dir=..., or --fresh to move the old one aside"
                raise RunError(f"{self.run.path}: began with other {what}: fingerprint {facts.get(fact)} then, {now} now; {ways_out}")

    def _mark_start(self) -> None:
        shown = reached(self.run.path / "metrics.jsonl")
        self._cut_back()
        self.trackers.start(self.progress.step, shown)
        self.run.closing.callback(self.trackers.close)
        launches = (self.run.status() or {}).get("launches", 0) + 1
        begins = {"step": self.progress.step, "steps": self.steps, "checkpoint": name_of(self.saved), "launches": launches}
        self.run.set_status("running", None, "training", **begins, job=slurm.job(), base=self.base, held_out=self.feed.held_out)

    def _data_order(self, work: Work) -> list[str]:
        """The ids of the step's examples, slot by slot, as they went through the forward on whichever rank."""
        ranks = self.runtime.gather([entry for batch in work.batches for entry in batch.ids])
        return [id for _, ids in sorted(entry for rank in ranks for entry in rank) for id in ids]

    def _metrics(self, work: Work, result: StepResult, seconds: float) -> dict[str, Any]:
        dropped = {"dropped": work.dropped} if self.recipe.data.streaming else {}
        return {
            "step": self.progress.step,
            "epoch": round(work.epoch, 6),
            "loss": result.loss,
            "learning_rate": result.learning_rate,
            "grad_norm": result.grad_norm,
            "trained_tokens": 0 if result.untrained else work.targets,
            "tokens": work.tokens,
            "examples": work.examples,
            **dropped,
            # a step that is passed over takes no time, and says nothing about speed
            "tokens_per_second": None if self.passes_over(work) else round(work.tokens / seconds, 1),
            "seconds": round(seconds, 4),
            "memory_bytes": self.runtime.memory_bytes(),
            **self.saver.take_clocks(),
        }

    def _facts(self) -> dict[str, Any]:
        """What a checkpoint notes beside the progress: what resume checks, and what a reader wants to know."""
        return {
            "steps": self.steps,
            "encoding": self.feed.encoding,
            "data": self.feed.fingerprint,
            "held_out": self.feed.held_out,
            "base": self.base,
            # all noise is drawn from (seed, step, slot): this and the step are every random generator's state
            "rng": {"seed": self.recipe.train.seed},
            "written_by": {"world_size": self.runtime.world_size, "sharding": self.runtime.sharding},
        }


def name_of(step: int) -> str | None:
    """Of a step's checkpoint; None for step 0, which has none."""
    return f"checkpoint-{step}" if step else None
