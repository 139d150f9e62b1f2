"""Near-duplicates and contamination, against brute force."""

import random

import numpy as np
import pytest

from mistral_dist.data import duplicates
from mistral_dist.data.duplicates import Benchmark, Families, candidates, near_pairs, similarity, sketch, superfluous

WORDS = [f"w{n}" for n in range(400)]


def sketches(texts: list[str]) -> np.ndarray:
    return np.array([sketch(text) for text in texts], np.uint32)


def corpus(seed: int) -> list[str]:
    """Random texts, copies that differ in a word or two at any place, and texts from one form that are not near."""
    rng = random.Random(seed)
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(8, 60))) for _ in range(150)]
    for text in list(texts):
        words = text.split()
        for _ in range(rng.randint(1, 2)):
            words[rng.randrange(len(words))] = rng.choice(WORDS)
        texts.append(" ".join(words))
    form = "dear customer we have the following to say about your order of last week "
    texts += [form + " ".join(rng.choices(WORDS, k=12)) for _ in range(120)]
    rng.shuffle(texts)
    return texts


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("threshold", [0.7, 0.8, 0.9])
def test_near_pairs_are_those_of_brute_force(seed: int, threshold: float) -> None:
    texts = corpus(seed)
    wanted = {(j, i) for j in range(len(texts)) for i in range(j) if similarity(texts[j], texts[i]) >= threshold}
    assert wanted
    assert set(near_pairs(sketches(texts), np.arange(len(texts)), threshold, texts.__getitem__)) == wanted


def test_the_first_stays_and_those_that_go_are_near_one_that_stays() -> None:
    texts = corpus(3)
    gone = superfluous(sketches(texts), np.arange(len(texts)), 0.8, texts.__getitem__)
    for document, other in gone.items():
        assert other < document
        assert other not in gone
        assert similarity(texts[document], texts[other]) >= 0.8
    left = [n for n in range(len(texts)) if n not in gone]
    assert all(similarity(texts[i], texts[j]) < 0.8 for i in left for j in left if i < j)


def test_many_copies_and_many_texts_of_one_form(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of equal bands that are too long for all pairs: copies are found, and forms do not make it quadratic."""
    monkeypatch.setattr(duplicates, "ALL_PAIRS", 16)
    monkeypatch.setattr(duplicates, "KINDS", 4)
    rng = random.Random(0)
    copies = [" ".join(WORDS[:40]) + f" and number {n}" for n in range(300)]
    forms = [" ".join(WORDS[100:120]) + " " + " ".join(rng.choices(WORDS[200:], k=20)) for _ in range(300)]
    texts = copies + forms
    gone = superfluous(sketches(texts), np.arange(len(texts)), 0.8, texts.__getitem__)
    assert gone == dict.fromkeys(range(1, 300), 0)


def test_members_are_compared_in_their_order_and_no_others() -> None:
    text = " ".join(WORDS[:40])
    texts = [text, text + " a", text + " b", "something else altogether, and long enough"]
    assert superfluous(sketches(texts), np.array([2, 3, 0]), 0.8, texts.__getitem__) == {0: 2}
    both = superfluous(sketches(texts), np.arange(4), 0.8, texts.__getitem__, lambda one, other: {one, other} == {0, 1})
    assert both == {2: 0}


@pytest.mark.parametrize("size", [8, 64, 1000])
def test_clusters_of_any_size_cost_no_more_than_a_few_pairs_a_document(size: int) -> None:
    """Texts that are all near each other: with all pairs of all bands it would be 32 x size / 2 a document."""
    texts = [" ".join(f"c{n // size}w{k}" for k in range(40)) + f" number {n}" for n in range(2000)]
    found = sum(len(earlier) for _, earlier in candidates(sketches(texts), np.arange(2000), 0.8))
    assert 2000 - 2000 // size <= found <= 40 * 2000


def test_scripts_without_blanks_have_words_too() -> None:
    one, other = "机器学习是人工智能的一个分支，它研究如何从数据中学习。", "机器学习是人工智能的一个分支，它研究如何从数据里学习。"
    assert 0.4 < similarity(one, other) < 1
    assert Benchmark(["法国的首都是哪一座城市，请回答。"]).run_in("问：法国的首都是哪一座城市，请回答。答：巴黎") is not None


def test_similarity_is_jaccard_of_runs_of_five_words() -> None:
    assert similarity("a b c d e f", "A  B c d e f") == 1
    assert similarity("a b c d e f", "a b c d e x") == pytest.approx(1 / 3)
    assert similarity("short", "short text") == 0


def test_a_benchmark_is_recognised_inside_a_longer_text() -> None:
    thirteen = "one two three four five six seven eight nine ten eleven twelve thirteen"
    benchmark = Benchmark([thirteen + " fourteen", "What is the capital of France?", "too short to prove"])
    assert benchmark.run_in(f"Well: {thirteen.upper()}! And so on") == thirteen
    assert benchmark.run_in("Q: what is the capital of france? A: Paris") == "what is the capital of france"
    assert benchmark.run_in("two three four five six seven eight nine ten eleven twelve thirteen") is None
    assert benchmark.run_in("it is too short to prove anything") is None
    assert Benchmark([]).run_in(thirteen) is None


def test_families_are_what_hangs_together() -> None:
    families = Families(6)
    for one, other in [(4, 5), (1, 2), (2, 5)]:
        families.join(one, other)
    assert [families.of(n) for n in range(6)] == [0, 1, 1, 3, 1, 1]
