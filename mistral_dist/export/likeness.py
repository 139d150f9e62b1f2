"""How like a form is to the live adapter (the 4-bit base with the adapter on it), on validation examples: by token and by answer."""

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mistral_dist.answers import label_row, label_scores, write_answers
from mistral_dist.config import Recipe
from mistral_dist.data.encode import Encoder
from mistral_dist.data.example import from_record
from mistral_dist.data.stream import Batch, collate
from mistral_dist.errors import CheckpointError

POSITIONS = 2048
"""Target tokens that are compared at most; the distribution at each, over 32,768 tokens in float32, takes 131 kB."""
AT_LEAST = 8
"""Examples that are read, however long they are."""
TOKENS = 8192
"""Tokens of more examples than that: a classifier's have two targets behind a long prompt, and each model reads
them all (the demo's 119 on two CPU cores: some 10 s a model)."""
SLICE = 256
"""Of those at once."""
QUESTIONS = 32
"""Prompts that are answered at most."""
ANSWER_TOKENS = 64
"""Of such an answer, at most."""


@dataclass(frozen=True)
class Outputs:
    """What a model says to the examples."""

    logits: torch.Tensor
    """float32 [targets, vocabulary], on the CPU"""
    answers: list[str]
    """Of a classifier its labels, else what it writes, greedily."""


@dataclass(frozen=True)
class Likeness:
    """A form beside the live adapter."""

    loss: float
    """Of the form per target token, in nats."""
    live_loss: float
    kl: float
    """Mean Kullback-Leibler divergence of the form's next-token distribution from the live adapter's, in nats."""
    max_kl: float
    max_logit_difference: float
    """The largest difference of two logits."""
    same_token: float
    """In which part of the places the likeliest next token is the same."""
    same_answer: float
    """Which part of the answers are the same, to the letter."""
    accuracy: float | None = None
    """Of the form, of a classifier."""
    live_accuracy: float | None = None


class Questions:
    """Validation examples, those with the smallest ids, and what is asked of them."""

    def __init__(self, recipe: Recipe, encoder: Encoder, records: Iterable[dict[str, Any]]) -> None:
        """`records`: of the validation split."""
        self._recipe, self._encoder = recipe, encoder
        self._records: list[dict[str, Any]] = []
        targets, tokens = POSITIONS, TOKENS
        for record in heapq.nsmallest(POSITIONS, records, key=lambda record: record["id"]):
            if targets <= 0 or (tokens < record["tokens"] and len(self._records) >= AT_LEAST):
                break
            self._records.append(record)
            targets -= record["targets"]
            tokens -= record["tokens"]
        self._asked = self._records[:QUESTIONS]

    def __len__(self) -> int:
        return len(self._records)

    @torch.no_grad()
    def ask(self, model: Any, device: torch.device) -> Outputs:
        """Every target's distribution, each example in a row of its own, and the answers. Raises CheckpointError for what is no number."""
        logits = torch.cat([self._logits(model, record, device) for record in self._records])[:POSITIONS]
        if not torch.isfinite(logits).all():
            raise CheckpointError("its logits are not finite on validation examples")
        return Outputs(logits, self._answers(model, device))

    def compare(self, live: Outputs, form: Outputs) -> Likeness:
        """What lies between them."""
        targets = torch.cat([self._batch(record).targets for record in self._records])[:POSITIONS]
        parts = (_distances(*part) for part in zip(live.logits.split(SLICE), form.logits.split(SLICE), targets.split(SLICE), strict=True))
        kl, same, live_losses, losses = (torch.cat(column) for column in zip(*parts, strict=True))
        right = [record.get("label") for record in self._asked] if self._classifies else None
        return Likeness(
            loss=float(losses.mean()),
            live_loss=float(live_losses.mean()),
            kl=float(kl.mean()),
            max_kl=float(kl.max()),
            max_logit_difference=float((live.logits - form.logits).abs().max()),
            same_token=float(same.mean()),
            same_answer=_part_alike(live.answers, form.answers),
            accuracy=_part_alike(form.answers, right) if right else None,
            live_accuracy=_part_alike(live.answers, right) if right else None,
        )

    @property
    def _classifies(self) -> bool:
        return self._recipe.task.kind == "classification"

    def _batch(self, record: dict[str, Any]) -> Batch:
        return Batch(**collate([self._encoder.encode(from_record(record))]), ids=())

    def _logits(self, model: Any, record: dict[str, Any], device: torch.device) -> torch.Tensor:
        batch = self._batch(record).to(device)
        where = batch.predict_from[:POSITIONS]
        output = model(input_ids=batch.input_ids, position_ids=batch.position_ids, logits_to_keep=where, use_cache=False)
        return output.logits[0].float().cpu()

    def _answers(self, model: Any, device: torch.device) -> list[str]:
        if self._classifies:
            return [self._label(model, record["text"], device) for record in self._asked]
        prompts = [self._prompt(record) for record in self._asked]
        return [write_answers(model, [prompt], self._encoder.tokenizer, ANSWER_TOKENS, device)[0].text for prompt in prompts]

    def _label(self, model: Any, text: str, device: torch.device) -> str:
        labels = self._recipe.task.labels
        scores = label_scores(model, label_row([self._encoder.candidates(text)]), 1, len(labels), device)
        return labels[int(scores.argmax())]

    def _prompt(self, record: dict[str, Any]) -> list[int]:
        """What stands before the first answer; of a plain text its first half."""
        encoded = self._encoder.encode(from_record(record))
        end = max(1, encoded.ids.size // 2) if self._recipe.task.kind == "pretrain" else int(encoded.targets[0])
        return [int(id) for id in encoded.ids[:end]]


def _distances(live: torch.Tensor, form: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Of each target, float64: KL divergence, whether the likeliest token is the same, the loss of either. (Float32: noise of 1e-7.)"""
    p, q = live.double().log_softmax(-1), form.double().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1).clamp(min=0)
    losses = (-each.gather(1, targets[:, None])[:, 0] for each in (p, q))
    return kl, (live.argmax(-1) == form.argmax(-1)).double(), *losses


def _part_alike(one: Sequence[Any], other: Sequence[Any]) -> float:
    return sum(a == b for a, b in zip(one, other, strict=True)) / len(one)
