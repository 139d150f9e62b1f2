"""Classification: which label the model finds most likely, or which one it writes."""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from mistral_dist import metrics
from mistral_dist.answers import MODELS, label_row, label_scores, write_answers
from mistral_dist.config import Recipe
from mistral_dist.data.encode import Encoder
from mistral_dist.exams.exam import WORST, Answers, Lines, Marked, Records, by_length, refuse_nonfinite, rows_of, shown
from mistral_dist.resampling import gain, mcnemar
from mistral_dist.runtime.engine import Runtime

KEPT = 4096
"""Encoded prompts that are kept, since base and tuned are asked the same."""
Given = dict[str, list[int | None]]
"""The label that base and tuned gave each record; None for what is no label."""


class Labels:
    """The log-probability of each label as the whole answer, in nats; the likeliest is the prediction. An answer: [labels] floats."""

    name = "labels"

    def __init__(self, recipe: Recipe, runtime: Runtime, encoder: Encoder, records: Records) -> None:
        self._recipe, self._device, self._records = recipe, runtime.device, records
        self._candidates = functools.lru_cache(KEPT)(lambda index: encoder.candidates(records[index]["text"]))
        self.rows = rows_of(self._lengths(runtime), recipe.evaluate.max_tokens)

    def take(self, model: Any, row: Sequence[int]) -> list[Any]:
        """The log-probabilities of the labels, for each example."""
        laid_out, labels = label_row([self._candidates(index) for index in row]), len(self._recipe.task.labels)
        found: list[Any] = label_scores(model, laid_out, len(row), labels, self._device).tolist()
        return found

    def mark(self, answers: Answers) -> Marked:
        """The mistakes that the tuned model was most sure of are the worst."""
        refuse_nonfinite(answers, self._records)
        everyone, labels = range(len(self._records)), self._recipe.task.labels
        given: Given = {which: [int(np.argmax(answers[which][index])) for index in everyone] for which in MODELS}
        scores = [{"id": self._records[index]["id"], **{which: answers[which][index] for which in MODELS}} for index in everyone]
        worst = []
        for index in everyone:
            label, likely = labels.index(self._records[index]["label"]), probabilities(answers["tuned"][index])
            if label != (tuned := given["tuned"][index]):
                sure = {"probability": round(float(likely.max()), 4), "probability_of_label": round(float(likely[label]), 4)}
                worst.append(shown(self._records[index], label=labels[label], tuned=labels[tuned or 0], **sure))
        worst.sort(key=lambda line: -line["probability"])
        return _marked(self._recipe, self._records, given, scores, worst)

    def _lengths(self, runtime: Runtime) -> list[int]:
        """Tokens of each record with all its labels; each rank encodes its share."""
        mine = range(runtime.rank, len(self._records), runtime.world_size)
        shares = runtime.gather({index: self._length(index) for index in mine})
        known = {index: length for share in shares for index, length in share.items()}
        return [known[index] for index in range(len(self._records))]

    def _length(self, index: int) -> int:
        found = self._candidates(index)
        return len(found.prompt) + sum(len(answer) - 1 for answer in found.answers)


class WrittenLabels:
    """The model writes; what is none of the labels, but for case, counts as no label. An answer: [text, whether it ended by itself]."""

    name = "written labels"

    def __init__(self, recipe: Recipe, runtime: Runtime, encoder: Encoder, records: Records) -> None:
        self._recipe, self._device, self._tokenizer, self._records = recipe, runtime.device, encoder.tokenizer, records
        self._prompts = {index: encoder.prompt(encoder.question(record["text"])) for index, record in enumerate(records)}
        self._longest = max(map(len, encoder.candidates("").answers))
        self.rows = by_length(self._prompts, recipe.evaluate.batch_size)

    def take(self, model: Any, row: Sequence[int]) -> list[Any]:
        """[text, ended] of each example."""
        prompts = [self._prompts[index] for index in row]
        return [[answer.text, answer.ended] for answer in write_answers(model, prompts, self._tokenizer, self._longest, self._device)]

    def mark(self, answers: Answers) -> Marked:
        """Mistakes in the order of the records: an answer of text has no likelihood."""
        everyone, labels = range(len(self._records)), self._recipe.task.labels
        given: Given = {which: [_label(answers[which][index][0], labels) for index in everyone] for which in MODELS}
        scores = [{"id": self._records[index]["id"], **{which: answers[which][index][0] for which in MODELS}} for index in everyone]
        wrong = [index for index in everyone if given["tuned"][index] != labels.index(self._records[index]["label"])]
        worst = [shown(self._records[index], label=self._records[index]["label"], tuned=answers["tuned"][index][0]) for index in wrong]
        return _marked(self._recipe, self._records, given, scores, worst)


def _marked(recipe: Recipe, records: Records, given: Given, scores: Lines, worst: Lines) -> Marked:
    labels, samples = list(recipe.task.labels), recipe.evaluate.bootstrap_samples
    truth = [labels.index(record["label"]) for record in records]
    base, tuned = (np.array([label == wanted for label, wanted in zip(given[which], truth, strict=True)]) for which in MODELS)
    reports = {which: metrics.report(metrics.confusion_matrix(truth, given[which], len(labels)), labels, samples) for which in MODELS}
    named = {which: [None if label is None else labels[label] for label in given[which]] for which in MODELS}
    predictions = [
        {"id": record["id"], "place": record["place"], "label": record["label"], **{which: named[which][index] for which in MODELS}}
        for index, record in enumerate(records)
    ]
    about = {"labels": labels, "method": recipe.evaluate.method}
    difference = {"accuracy": gain(base, tuned, samples), "mcnemar": mcnemar(base, tuned)}
    return Marked(reports["base"], reports["tuned"], difference, about, predictions=predictions, scores=scores, worst=worst[:WORST])


def _label(written: str, labels: Sequence[str]) -> int | None:
    if written in labels:
        return labels.index(written)
    return next((n for n, label in enumerate(labels) if label.casefold() == written.casefold()), None)


def probabilities(scores: Sequence[float]) -> np.ndarray:
    """Of the labels alone: the likelihoods of the whole answers, normalised over them."""
    weights = np.exp(np.array(scores) - max(scores))
    return np.asarray(weights / weights.sum())
