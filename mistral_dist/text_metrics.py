"""Written answers and the reference answers -> exact match, ROUGE-L, BLEU, chrF, how often the model stopped by itself."""

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import regex

from mistral_dist.data.duplicates import UNSPACED
from mistral_dist.errors import RecipeError
from mistral_dist.resampling import Interval, gain, interval_of_ratio

Metric = Callable[[str, str], float]
"""(answer, reference) -> a number; its mean is reported."""


TAKEN = ("exact_match", "rouge_l", "stop_rate", "bleu", "chrf", "n")
"""Names in what is reported."""


def exact_match(answer: str, reference: str) -> float:
    """1 where the two are the same but for blanks around them, else 0."""
    return float(answer.strip() == reference.strip())


WORD = regex.compile(rf"{UNSPACED.pattern}\p{{M}}*|(?:(?!{UNSPACED.pattern})[\p{{L}}\p{{N}}]\p{{M}}*)+")
"""Letters and digits of any script with their marks (vowel signs, accents); where a script puts no blanks between words, each letter by
itself. Of ASCII text the words that rouge-score finds."""


class _Words:
    """rouge-score's own tokenizer knows a to z and 0 to 9 alone: two equal answers in Russian would have nothing in common."""

    def tokenize(self, text: str) -> list[str]:
        return WORD.findall(text.lower())


def rouge_l() -> Metric:
    """F1 of the longest common subsequence of words (Lin, 2004), by Google's rouge-score, without stemming."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=False, tokenizer=_Words())
    return lambda answer, reference: float(scorer.score(reference, answer)["rougeL"].fmeasure)


def own_metric(where: str) -> Metric:
    """A user's function by `module:function`; the module is looked for in the current folder, too. Raises RecipeError."""
    module, _, name = where.partition(":")
    if name in TAKEN:
        raise RecipeError(f"evaluate.metric: {where}: {name} is a measure of ours; give the function another name")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise RecipeError(f"evaluate.metric: {where}: {error}; give module:function, the module in {here} or installed") from error
    if not callable(found):
        raise RecipeError(f"evaluate.metric: {where}: is no function; it is called with (answer, reference) and returns a number")
    return found


def each_answer(answers: Sequence[str], references: Sequence[str], ended: Sequence[bool], own: str | None = None) -> dict[str, np.ndarray]:
    """Each measure of a single answer: float64 [answers], 0 to 1 but for a user's own."""
    measures: dict[str, Metric] = {"exact_match": exact_match, "rouge_l": rouge_l()}
    if own is not None:
        measures[own.partition(":")[2]] = own_metric(own)
    pairs = list(zip(answers, references, strict=True))
    found = {name: np.array([measure(*pair) for pair in pairs], np.float64) for name, measure in measures.items()}
    for name, values in found.items():
        if not np.isfinite(values).all():
            answer, reference = pairs[int(np.argmax(~np.isfinite(values)))]
            raise RecipeError(f"evaluate.metric: {name} is no finite number for the answer {answer[:80]!r} to {reference[:80]!r}")
    return {**found, "stop_rate": np.array(ended, np.float64)}


def report(
    each: Mapping[str, np.ndarray], answers: Sequence[str], references: Sequence[str], samples: int, of: Sequence[str] | None = None
) -> dict[str, Any]:
    """What test.json says about one model's answers; each measure with its interval. bleu and chrf: 0 to 100.

    BLEU (Papineni et al., 2002) and chrF (Popovic, 2015) are sacrebleu's with its default settings, of the whole set, and so is
    their interval, which is symmetric about the mean of the resamples. `of`: the conversation that each answer is from.
    """
    means = {name: interval_of_ratio(values, np.ones(len(values)), samples, of=of) for name, values in each.items()}
    return {**means, **_of_the_whole(answers, references, samples), "n": len(references)}


def difference(
    base: Mapping[str, np.ndarray], tuned: Mapping[str, np.ndarray], samples: int, of: Sequence[str] | None = None
) -> dict[str, Interval]:
    """How much better tuned is than base on the same examples, by each measure of a single answer."""
    return {name: gain(base[name], tuned[name], samples, of) for name in base}


def _of_the_whole(answers: Sequence[str], references: Sequence[str], samples: int) -> dict[str, Interval]:
    from sacrebleu.metrics import BLEU, CHRF

    found = {}
    for name, metric in (("bleu", BLEU()), ("chrf", CHRF())):
        score = metric.corpus_score(list(answers), [list(references)], n_bootstrap=samples)
        found[name] = {"value": float(score.score), "low": float(score._mean - score._ci), "high": float(score._mean + score._ci)}
    return found
