"""Measures of written answers against the libraries that they are known by."""

from pathlib import Path

import numpy as np
import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

from mistral_dist import text_metrics
from mistral_dist.errors import RecipeError

REFERENCES = ["The cat sat on the mat.", "It is raining today, is it not?", "Four", "A fine day", "one two three four five six"] * 5
ANSWERS = ["The cat sat on a mat.", "Today it is raining.", " Four\n", "", "one two three four six five"] * 5
ENDED = [True, True, False, True, True] * 5


def test_equal_to_rouge_score_and_sacrebleu() -> None:
    found = text_metrics.report(ANSWERS, REFERENCES, ENDED, samples=200)
    scorer = RougeScorer(["rougeL"])
    rouge = np.mean([scorer.score(reference, answer)["rougeL"].fmeasure for answer, reference in zip(ANSWERS, REFERENCES, strict=True)])
    assert found["rouge_l"]["value"] == pytest.approx(rouge, abs=1e-9)
    assert found["bleu"]["value"] == pytest.approx(sacrebleu.corpus_bleu(ANSWERS, [REFERENCES]).score, abs=1e-9)
    assert found["chrf"]["value"] == pytest.approx(sacrebleu.corpus_chrf(ANSWERS, [REFERENCES]).score, abs=1e-9)
    assert found["exact_match"]["value"] == 1 / 5, "but for blanks around it"
    assert found["stop_rate"]["value"] == 4 / 5
    assert found["n"] == 25
    for name, interval in found.items():
        if name != "n":
            assert interval["low"] < interval["value"] < interval["high"], name
    assert found == text_metrics.report(ANSWERS, REFERENCES, ENDED, samples=200), "the same each time"


def test_the_difference_is_of_the_same_examples() -> None:
    """A model that is better by as much on each example is better for certain, though each of the two varies widely."""
    better = [*REFERENCES[:20], *ANSWERS[20:]]
    found = text_metrics.difference(ANSWERS, better, REFERENCES, samples=500)
    assert set(found) == {"exact_match", "rouge_l"}
    assert found["exact_match"]["value"] == pytest.approx(16 / 25)
    assert found["rouge_l"]["low"] > 0
    same = text_metrics.difference(ANSWERS, ANSWERS, REFERENCES, samples=500)
    assert same["rouge_l"] == {"value": 0.0, "low": 0.0, "high": 0.0}


def test_a_metric_of_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_measures.py").write_text("def lengths(answer, reference):\n    return len(answer) / len(reference)\nNO = 3\n")
    monkeypatch.chdir(tmp_path)
    found = text_metrics.report(["ab", "abcd"], ["abcd", "abcd"], [True, True], 50, "my_measures:lengths")
    assert found["lengths"]["value"] == 0.75
    for where, why in (("my_measures:nothing", "nothing"), ("no_such_module:f", "no_such_module"), ("my_measures:NO", "no function")):
        with pytest.raises(RecipeError, match=rf"evaluate\.metric: {where}: .*{why}"):
            text_metrics.own_metric(where)
