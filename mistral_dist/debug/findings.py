"""What the debug mode looks at. Each function takes what it needs, changes nothing, and says what it found."""

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from mistral_dist.config import Task
from mistral_dist.data.encode import Encoded, Encoder
from mistral_dist.data.stream import Batch
from mistral_dist.preview import Shown, as_text, spans_of
from mistral_dist.runtime.memory import GIB

SHOWN = 3
"""Examples that are shown in full."""
SHOWN_CHARACTERS = 1_500
"""Of each of them, the end: there the targets are."""
STATE = ("adapter/adapter_model.safetensors", "optimizer.safetensors")
CLOCKS = ("tokens_per_second", "seconds", "memory_bytes", "save")


@dataclass(frozen=True)
class Finding:
    """What one look showed."""

    what: str
    ok: bool
    told: str
    """One line: what was found, or what is wrong."""
    lines: tuple[str, ...] = ()
    """More of it."""


def micro_batch(batch: Batch, vocabulary: int, logits: torch.Tensor) -> Finding:
    """Shapes and dtypes of what one forward gets and gives, and whether they fit each other.

    `logits`: float [N, vocabulary] at the N positions that predict a target.
    """
    tensors = {name: value for name, value in vars(batch).items() if name != "ids"}
    rows = [f"{name:<13} {str(value.dtype).removeprefix('torch.'):<8} {list(value.shape)}" for name, value in tensors.items()]
    rows.append(f"{'logits':<13} {str(logits.dtype).removeprefix('torch.'):<8} {list(logits.shape)}")
    examples = sum(len(ids) for _, ids in batch.ids)
    tokens, starts = batch.input_ids.shape[1], int((batch.position_ids == 0).sum())
    count = f"{examples} example{'s' if examples != 1 else ''}"
    told = f"{len(batch.ids)} pack{'s' if len(batch.ids) != 1 else ''} of {count}, {tokens:,} tokens, {len(batch.targets):,} targets"
    wrong = ""
    if not 0 <= int(batch.input_ids.min()) <= int(batch.input_ids.max()) < vocabulary:
        wrong = f"token ids from {int(batch.input_ids.min())} to {int(batch.input_ids.max())}, the model knows 0 to {vocabulary - 1}"
    elif starts != examples:
        wrong = f"the positions begin anew {starts} times, for {count}: attention would not see where an example begins"
    elif list(logits.shape) != [len(batch.targets), logits.shape[-1]] or logits.shape[-1] < vocabulary:
        wrong = f"the model gives logits {list(logits.shape)} for {len(batch.targets)} targets and {vocabulary} token ids"
    elif not torch.isfinite(logits).all():
        wrong = "the model's logits are not finite before a single step was made"
    return Finding("micro-batch", not wrong, wrong or told, tuple(rows))


def examples_in(batch: Batch) -> list[Encoded]:
    """The examples of a row, each by itself, as the model is fed them. Raises ValueError where a target is not the next token."""
    ids, predict_from = batch.input_ids[0], batch.predict_from
    if int(predict_from.min()) < 0 or int(predict_from.max()) + 1 >= len(ids) or not torch.equal(ids[predict_from + 1], batch.targets):
        raise ValueError("a target is not the token after the one that predicts it")
    starts = (batch.position_ids[0] == 0).nonzero()[:, 0].tolist()
    found = []
    for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
        inside = (predict_from + 1 > start) & (predict_from + 1 < end)
        weights = batch.weights[inside].tolist()
        targets = (predict_from[inside] + 1 - start).numpy()
        found.append(Encoded(ids[start:end].numpy(), targets, weights[0] if weights else 1.0))
    if sum(len(one.targets) for one in found) != len(batch.targets):
        raise ValueError("a target is the first token of an example, which nothing of it predicts")
    return found


def targets(batch: Batch, task: Task, encoder: Encoder) -> Finding:
    """Which tokens the loss counts, decoded; and whether they are those that the task means."""
    try:
        examples = examples_in(batch)
    except ValueError as error:
        return Finding("targets", False, str(error))
    pages = [Shown("", spans_of(example, encoder)) for example in examples]
    wrong = next((problem for example, page in zip(examples, pages, strict=True) if (problem := _odd(example, page, task))), "")
    share = sum(len(one.targets) for one in examples) / sum(len(one.ids) for one in examples)
    told = f"the loss counts {share:.0%} of the tokens; ⟦these⟧ of the first examples:"
    return Finding("targets", not wrong, wrong or told, tuple(f"{_end(as_text(page.spans))}\n" for page in pages[:SHOWN]))


def _odd(example: Encoded, page: Shown, task: Task) -> str:
    """What is wrong with an example's targets; empty where nothing is."""
    learned = "".join(span.text for span in page.spans if span.target and not span.special).strip()
    if not len(example.targets):
        return "an example has no target"
    if task.kind == "pretrain":
        return "" if len(example.targets) == len(example.ids) - 1 else "a token of a text is no target, though the task is to go on with it"
    if len(example.targets) >= len(example.ids) - 1:
        return "every token is a target, the question as well as the answer"
    if task.kind == "classification" and learned not in task.labels:
        return f"the targets of an example say {learned[:80]!r}, which is none of task.labels"
    return ""


def _end(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else f"... {text[-SHOWN_CHARACTERS:]}"


def trainable(model: Any) -> Finding:
    """What is trained, by kind of module, and that it is the adapter in float32 and nothing else."""
    counts: Counter[str] = Counter()
    tensors: Counter[str] = Counter()
    named = dict(model.named_parameters())
    trained = {name: parameter for name, parameter in named.items() if parameter.requires_grad}
    for name, parameter in trained.items():
        counts[kind_of(name)[0]] += parameter.numel()
        tensors[kind_of(name)[0]] += 1
    rows = tuple(f"{kind:<24} {tensors[kind]:>5} tensors {count:>14,} parameters" for kind, count in sorted(counts.items()))
    base = [name for name in trained if not ("lora_" in name or "modules_to_save" in name)]
    other = next((name for name, parameter in trained.items() if parameter.dtype != torch.float32), None)
    frozen = sum(parameter.untyped_storage().nbytes() for name, parameter in named.items() if name not in trained)
    wrong = ""
    if not trained:
        wrong = "nothing is trained: no parameter takes a gradient"
    elif base:
        wrong = f"{base[0]} is trained, which is of the frozen base (and {len(base) - 1} more)"
    elif other is not None:
        wrong = f"{other} is {trained[other].dtype}; what is trained must be float32, or small updates are lost"
    told = f"{sum(counts.values()):,} parameters in float32; the base is frozen, {frozen / GIB:.2f} GiB"
    return Finding("trained parameters", not wrong, wrong or told, rows)


def kind_of(name: str) -> tuple[str, str]:
    """A trainable parameter's kind of module and what it is there, e.g. (`q_proj`, `lora_A`), (`lm_head`, `weight`)."""
    parts = [part for part in name.split(".") if part not in ("default", "modules_to_save")]
    *_, module, role = parts[:-1] if parts[-2].startswith("lora_") else parts
    return module, role


def gradients(update: int, parameters: Mapping[str, torch.nn.Parameter]) -> Finding:
    """Whether every trainable parameter has a gradient that is finite and not zero, just before an update (from 1).

    The gradient of a LoRA A is zero as long as its B is, as B is at the start.
    """
    what = f"gradients of step {update}"
    missing = [name for name, parameter in parameters.items() if parameter.grad is None]
    if missing:
        return Finding(what, False, f"{missing[0]} has none (and {len(missing) - 1} more); is its module part of the forward?")
    norms = {name: float(parameter.grad.norm()) for name, parameter in parameters.items() if parameter.grad is not None}
    infinite = [name for name, norm in norms.items() if not norm < float("inf")]
    if infinite:
        return Finding(what, False, f"{infinite[0]} has one that is not finite (and {len(infinite) - 1} more)")
    resting = {name for name in parameters if "lora_A" in name and not parameters[name.replace("lora_A", "lora_B")].any()}
    dead = [name for name, norm in norms.items() if norm == 0 and name not in resting]
    if dead:
        return Finding(what, False, f"{dead[0]} has one that is zero everywhere (and {len(dead) - 1} more); it would never be trained")
    told = f"all {len(parameters)} are there and finite; none is zero"
    if resting:
        told = (
            f"all {len(parameters)} are there and finite; {len(resting)} of lora_A are zero, as they must be while their B is; no other is"
        )
    by_role: dict[str, list[float]] = defaultdict(list)
    for name, norm in norms.items():
        by_role[kind_of(name)[1]].append(norm)
    rows = (f"{role:<24} norms from {min(of):.1e} to {max(of):.1e}" for role, of in sorted(by_role.items()))
    return Finding(what, True, told, tuple(rows))


def memory(parts: Mapping[str, int], peak: int, device: str) -> Finding:
    """What held the memory in step 2, when there are gradients and moments. Nothing here is wrong by itself."""
    rest = "activations and the rest" if device == "cuda" else "activations, Python and its libraries"
    rows = {**parts, rest: max(0, peak - sum(parts.values()))}
    lines = tuple(f"{name:<38} {size / GIB:8.3f} GiB" for name, size in rows.items())
    return Finding("memory", True, f"{peak / GIB:.2f} GiB at the peak of two steps, of which", lines)


def descent(before: float, after: float, steps: int, untrained: int) -> Finding:
    """Whether training made the loss of what it was trained on smaller; `before`, `after`: nats per target, of the same examples."""
    told = f"{before:.4f} before, {after:.4f} after {steps} steps, on the examples of step 1"
    if untrained:
        return Finding("loss", False, f"{untrained} of {steps} steps were not trained, see untrained.jsonl")
    ok = after < before
    return Finding("loss", ok, told if ok else f"{told}: it does not go down; is optim.learning_rate too high, or much too low?")


def resumed(run: Path, other: Path, first: int, last: int, *, exact: bool, rounding: float) -> Finding:
    """Whether a run that went on from a checkpoint in another process did what the run that was never stopped did.

    `first`, `last`: the steps that both made. `exact`: to the bit; else losses within `rounding`, of kernels that add in any order.
    """
    one, two = (path / "checkpoints" / f"checkpoint-{last}" for path in (run, other))
    steps, again = (_steps(path, first, last) for path in (run, other))
    moved = [step for step, (a, b) in enumerate(zip(steps, again, strict=True), first) if a != b]
    worst = max(abs((a["loss"] or 0.0) - (b["loss"] or 0.0)) for a, b in zip(steps, again, strict=True))
    differing = list(_differing(one, two))
    what = "resume"
    if exact and (differing or moved):
        where = f"{len(differing)} tensors, the first {differing[0]}" if differing else f"the metrics of step {moved[0]}"
        return Finding(what, False, f"from checkpoint-{first - 1} it ends with other bits: {where}; losses differ by up to {worst:.1e}")
    if worst > rounding:
        return Finding(what, False, f"from checkpoint-{first - 1} losses differ by up to {worst:.1e}; rounding explains {rounding:.0e}")
    same = (
        "adapter, moments, metrics and data order of"
        if exact
        else f"losses (within {worst:.1e}, of {rounding:.0e} that rounding allows) of"
    )
    how = "to the bit" if exact else "to rounding; train.deterministic=true makes it exact"
    return Finding(what, True, f"from checkpoint-{first - 1} in another process: the same {same} steps {first} to {last}, {how}")


def _steps(run: Path, first: int, last: int) -> list[dict[str, Any]]:
    """Metrics, without clocks, and data order of some steps."""
    found: list[dict[str, Any]] = [{"loss": None} for _ in range(first, last + 1)]
    for file in ("metrics.jsonl", "data_order.jsonl"):
        for entry in map(json.loads, (run / file).read_text(encoding="utf-8").splitlines()):
            if first <= entry["step"] <= last:
                found[entry["step"] - first] |= {key: value for key, value in entry.items() if key not in CLOCKS}
    return found


def _differing(one: Path, two: Path) -> Iterator[str]:
    for file in STATE:
        before, after = load_file(one / file), load_file(two / file)
        yield from sorted(before.keys() ^ after.keys())
        yield from (name for name in before.keys() & after.keys() if not torch.equal(before[name], after[name]))
