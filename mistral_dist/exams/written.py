"""Conversations: what the model writes instead of the last answer, and how near it is to that."""

from collections.abc import Mapping, Sequence
from typing import Any

from mistral_dist import text_metrics
from mistral_dist.answers import MODELS, write_answers
from mistral_dist.config import Recipe
from mistral_dist.data.encode import Encoder
from mistral_dist.data.example import from_record
from mistral_dist.exams.exam import Answers, Marked, Records, by_length, document_of
from mistral_dist.runtime.engine import Runtime


class Writer:
    """Greedy answers to prompts of token ids, by index. An answer: [text, whether it ended by itself]."""

    name = "written"

    def __init__(self, recipe: Recipe, runtime: Runtime, encoder: Encoder, prompts: Mapping[int, Sequence[int]]) -> None:
        self._rules, self._device, self._tokenizer, self._prompts = recipe.evaluate, runtime.device, encoder.tokenizer, prompts
        self.rows = by_length(prompts, recipe.evaluate.batch_size)

    def take(self, model: Any, row: Sequence[int]) -> list[Any]:
        """[text, ended] of each example."""
        prompts = [self._prompts[index] for index in row]
        found = write_answers(model, prompts, self._tokenizer, self._rules.max_new_tokens, self._device)
        return [[answer.text, answer.ended] for answer in found]


class Written(Writer):
    """Answers to as many conversations as the recipe says."""

    def __init__(self, recipe: Recipe, runtime: Runtime, encoder: Encoder, records: Records) -> None:
        chosen = _chosen(records, recipe.evaluate.answers)
        examples = {index: from_record(records[index]) for index in chosen}
        prompts = {index: encoder.prompt(example.messages[:-1], example.tools) for index, example in examples.items()}
        super().__init__(recipe, runtime, encoder, prompts)
        self._records = records
        self._references = {index: str(example.messages[-1]["content"]) for index, example in examples.items()}

    def mark(self, answers: Answers) -> Marked:
        """Each measure of text_metrics, and what each model wrote."""
        asked = sorted(self._references)
        if not asked:
            return Marked({}, {}, {})
        references = [self._references[index] for index in asked]
        texts = {which: [answers[which][index][0] for index in asked] for which in MODELS}
        ended = {which: [answers[which][index][1] for index in asked] for which in MODELS}
        each = {which: text_metrics.each_answer(texts[which], references, ended[which], self._rules.metric) for which in MODELS}
        samples, of = self._rules.bootstrap_samples, [document_of(self._records[index]["id"]) for index in asked]
        reports = {which: {"written": text_metrics.report(each[which], texts[which], references, samples, of)} for which in MODELS}
        gained = text_metrics.difference(each["base"], each["tuned"], samples, of)
        predictions = [
            {
                "id": self._records[index]["id"],
                "place": self._records[index]["place"],
                "reference": references[n],
                **{which: texts[which][n] for which in MODELS},
                **{f"{which}_ended": ended[which][n] for which in MODELS},
            }
            for n, index in enumerate(asked)
        ]
        return Marked(reports["base"], reports["tuned"], {"written": gained}, predictions=predictions)


def _chosen(records: Records, most: int) -> list[int]:
    """The conversations that end with an answer of text, those with the smallest ids: a sample that never changes."""
    found: list[int] = []
    for index in sorted(range(len(records)), key=lambda index: records[index]["id"]):
        turns = from_record(records[index]).messages
        if len(found) < most and len(turns) > 1 and turns[-1]["role"] == "assistant" and turns[-1]["content"].strip():
            found.append(index)
    return found
