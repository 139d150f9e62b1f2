"""How likely the reference is: the loss per target token, and its perplexity."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from mistral_dist.answers import MODELS, losses
from mistral_dist.config import Recipe
from mistral_dist.data.encode import Encoder
from mistral_dist.data.example import from_record
from mistral_dist.exams.exam import WORST, Answers, Marked, Records, document_of, refuse_nonfinite, rows_of, shown
from mistral_dist.resampling import interval_of_ratio
from mistral_dist.runtime.engine import Runtime

HUGE = 700.0
"""A loss whose exponential a float can still hold."""


class Losses:
    """The summed cross-entropy over an example's targets, in nats. An answer: a float."""

    name = "losses"

    def __init__(self, recipe: Recipe, runtime: Runtime, encoder: Encoder, records: Records) -> None:
        self._device, self._encoder, self._records = runtime.device, encoder, records
        self._samples = recipe.evaluate.bootstrap_samples
        self._documents = [document_of(record["id"]) for record in records]
        self.rows = rows_of([record["tokens"] for record in records], recipe.evaluate.max_tokens)

    def take(self, model: Any, row: Sequence[int]) -> list[Any]:
        """The summed loss of each example."""
        encoded = [self._encoder.encode(from_record(self._records[index])) for index in row]
        found: list[Any] = losses(model, encoded, self._device).tolist()
        return found

    def mark(self, answers: Answers) -> Marked:
        """Each target token counts once, as in training. The worst examples have the highest loss per target of their own."""
        refuse_nonfinite(answers, self._records)
        targets = np.array([record["targets"] for record in self._records], np.float64)
        base, tuned = (np.array([answers[which][index] for index in range(len(targets))]) for which in MODELS)
        scores = [
            {"id": record["id"], "targets": record["targets"], "base": float(base[index]), "tuned": float(tuned[index])}
            for index, record in enumerate(self._records)
        ]
        mean = tuned / targets
        worst = [shown(self._records[n], loss=round(float(mean[n]), 4)) for n in np.argsort(-mean, kind="stable")[:WORST].tolist()]
        return Marked(
            self._measures(base, targets),
            self._measures(tuned, targets),
            {"loss": interval_of_ratio(tuned - base, targets, self._samples, of=self._documents)},
            about={"targets": int(targets.sum())},
            scores=scores,
            worst=worst,
        )

    def _measures(self, summed: np.ndarray, targets: np.ndarray) -> dict[str, Any]:
        loss = interval_of_ratio(summed, targets, self._samples, of=self._documents)
        return {"loss": loss, "perplexity": {name: float(np.exp(min(value, HUGE))) for name, value in loss.items()}}
