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
    each = text_metrics.each_answer(ANSWERS, REFERENCES, ENDED)
    found = text_metrics.report(each, ANSWERS, REFERENCES, samples=200)
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
    assert found == text_metrics.report(each, ANSWERS, REFERENCES, samples=200), "the same each time"


def test_words_of_any_script_count() -> None:
    rouge = text_metrics.rouge_l()
    for text in ("Привет, мир!", "你好世界", "naïve café", "こんにちは 世界", "안녕하세요"):
        assert rouge(text, text) == 1
    assert rouge("你好世界", "你好人们") == 0.5
    for one, other in (("की", "का"), ("สวัสดี", "สวัสดู"), ("كَتَبَ", "كُتِبَ"), ("cafe\u0301", "cafe")):
        assert rouge(one, one) == 1
        assert rouge(one, other) < 1, "marks tell words apart"
    assert len(text_metrics.WORD.findall("हिन्दी में")) == 2
    assert text_metrics.WORD.findall("snake_case v2.0 中文abc") == ["snake", "case", "v2", "0", "中", "文", "abc"]


def test_the_difference_is_of_the_same_examples() -> None:
    """A model that is better by as much on each example is better for certain, though each of the two varies widely."""
    before = text_metrics.each_answer(ANSWERS, REFERENCES, ENDED)
    after = text_metrics.each_answer([*REFERENCES[:20], *ANSWERS[20:]], REFERENCES, ENDED)
    found = text_metrics.difference(before, after, samples=500)
    assert set(found) == {"exact_match", "rouge_l", "stop_rate"}
    assert found["exact_match"]["value"] == pytest.approx(16 / 25)
    assert found["rouge_l"]["low"] > 0
    assert text_metrics.difference(before, before, samples=500)["rouge_l"] == {"value": 0.0, "low": 0.0, "high": 0.0}


def test_a_metric_of_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_measures.py").write_text("def lengths(answer, reference):\n    return len(answer) / len(reference)\nNO = 3\n")
    monkeypatch.chdir(tmp_path)
    found = text_metrics.each_answer(["ab", "abcd"], ["abcd", "abcd"], [True, True], "my_measures:lengths")
    assert found["lengths"].tolist() == [0.5, 1.0]
    for where, why in (
        ("my_measures:nothing", "nothing"),
        ("no_such_module:f", "no_such_module"),
        ("my_measures:NO", "no function"),
        ("my_measures:bleu", "a measure of ours"),
    ):
        with pytest.raises(RecipeError, match=rf"evaluate\.metric: {where}: .*{why}"):
            text_metrics.own_metric(where)
