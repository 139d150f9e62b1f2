"""A finished run in the terminal: ask it, base and tuned side by side."""

from collections.abc import Sequence
from typing import Any

import torch
import transformers

from mistral_dist.answers import MODELS, Which, as_model, label_row, label_scores, write_answers
from mistral_dist.config import Recipe
from mistral_dist.data.encode import load_encoder
from mistral_dist.data.example import Message
from mistral_dist.evaluate import refuse_another_base
from mistral_dist.exams.labels import probabilities
from mistral_dist.model import load_tuned
from mistral_dist.run import RunDirectory


class Chat:
    """A loaded run that answers."""

    def __init__(self, recipe: Recipe, run: RunDirectory) -> None:
        self.recipe = recipe
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.encoder = load_encoder(recipe)
        refuse_another_base(recipe.model, run)
        self.model = load_tuned(recipe.asked_model, run.adapter, self.device, "sdpa")

    def classify(self, text: str, models: Sequence[Which] = MODELS) -> dict[str, dict[str, float]]:
        """Probability of each label, by model: the labels' likelihoods, normalised over the labels."""
        row = label_row([self.encoder.candidates(text)])
        labels = self.recipe.task.labels
        result: dict[str, dict[str, float]] = {}
        for name in models:
            with as_model(self.model, name):
                scores = label_scores(self.model, row, 1, len(labels), self.device)[0]
            result[name] = dict(zip(labels, probabilities(scores.tolist()).tolist(), strict=True))
        return result

    def reply(self, turns: Sequence[Message], streamer: Any = None, which: Which = "tuned") -> str:
        """A model's greedy answer to a conversation (pretrain: the continuation of the last turn's text)."""
        prompts, tokenizer = [self.encoder.prompt(turns)], self.encoder.tokenizer
        with as_model(self.model, which):
            (answer,) = write_answers(self.model, prompts, tokenizer, self.recipe.evaluate.max_new_tokens, self.device, streamer)
        return answer.text

    def printer(self) -> Any:
        """Prints an answer while it is made."""
        return transformers.TextStreamer(self.encoder.tokenizer, skip_prompt=True, skip_special_tokens=True)
