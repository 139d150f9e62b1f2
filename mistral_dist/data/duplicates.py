"""What takes two documents to see: the same text twice, nearly the same, under two labels, or in a benchmark.

Near-duplicates are found by MinHash (Broder 1997) with locality-sensitive hashing: rensa makes the sketches, equal bands
make candidates, and a pair counts only if the Jaccard similarity of its shingles, computed from the texts, reaches the
threshold. Nothing here knows files or splits: documents are numbers, in the order of who stays.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import rensa

PERMUTATIONS = 128
"""Hash functions of a sketch: the standard error of its Jaccard estimate is at most 1 / (2 sqrt(128)) = 0.044."""
BAND = 4
"""Sketch values in a band; 32 bands. Two texts of similarity 0.8 share one with probability 1 - (1 - 0.8^4)^32 > 0.9999999."""
DOUBT = 0.14
"""Pairs whose estimate is this far below the threshold are not looked at: 4 standard errors at a similarity of 0.8."""
SHINGLE = 5
"""Words in a shingle."""
RUN = 13
"""Words that a train example and a benchmark must not share in one run; 13 is GPT-3's (arXiv 2005.14165, appendix C)."""
SHORTEST_RUN = 5
"""A benchmark text of fewer words proves nothing."""
ALL_PAIRS = 16
"""Up to so many documents with an equal band (a run), each pair is a candidate; of more, each is compared with the first of
its kind. That bounds the pairs to 8 a document and band."""
KINDS = 64
"""Kinds that are told apart in a run. Texts from one form share bands by the thousand without being near; those that are
near meet in other bands, too."""
BLOCK = 50_000
"""Pairs whose sketches are compared at once: 50 MB."""
UNSPACED = re.compile(r"[\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff]")
"""A letter of a script that puts no blanks between words (Thai, Lao, Chinese, Japanese), or few (Korean): a word of its own."""


def words_of(text: str) -> list[str]:
    """The words of a text, in lower case."""
    text = text.lower()
    return text.split() if text.isascii() else UNSPACED.sub(r" \g<0> ", text).split()


def shingles(text: str) -> list[str]:
    """The runs of 5 words of a text; a shorter text is one shingle."""
    words = words_of(text)
    return [" ".join(words[i : i + SHINGLE]) for i in range(max(1, len(words) - SHINGLE + 1))]


def sketch(text: str) -> list[int]:
    """128 values of 32 bits; equal ones estimate the Jaccard similarity of the shingles."""
    made = rensa.RMinHash(num_perm=PERMUTATIONS, seed=0)
    made.update(shingles(text))
    return made.digest()


def similarity(one: str, other: str) -> float:
    """Jaccard similarity of the shingles of two texts, in [0, 1]."""
    first, second = set(shingles(one)), set(shingles(other))
    return len(first & second) / len(first | second)


def candidates(sketches: np.ndarray, members: np.ndarray, threshold: float) -> Iterator[tuple[int, np.ndarray]]:
    """For each document that may have near-duplicates before it: (document, those before it), both ascending.

    `sketches`: uint32 [documents, 128]; `members`: int64, the documents to compare, in the order of who stays. What comes
    out are positions in `members`.
    """
    found = [_pairs(sketches, members, band, threshold - DOUBT) for band in range(0, PERMUTATIONS, BAND)]
    pairs = np.concatenate(found)
    pairs = pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]
    edges = np.flatnonzero(np.diff(pairs[:, 0])) + 1
    for group in np.split(pairs, edges) if len(pairs) else []:
        yield int(group[0, 0]), group[:, 1]


def _pairs(sketches: np.ndarray, members: np.ndarray, band: int, least: float) -> np.ndarray:
    """(later, earlier) of documents whose first equal band this is and whose estimate reaches `least`; int64 [pairs, 2]."""
    keys = _keys(sketches[members, band : band + BAND])
    order = np.argsort(keys, kind="stable")
    begins = np.flatnonzero(np.diff(keys[order], prepend=~keys[order[:1]]))
    counts = np.diff(begins, append=len(keys))
    run, count = np.repeat(np.arange(len(begins)), counts), np.repeat(counts, counts)
    few = (count > 1) & (count <= ALL_PAIRS)
    found = [np.empty((0, 2), np.int64)]
    for pairs in _all_pairs(order[few], run[few]):
        found += [near[0] for near in _near(pairs, sketches, members, band, least)]
    for number in np.flatnonzero(counts > ALL_PAIRS):
        found += _by_kind(order[begins[number] : begins[number] + counts[number]], sketches, members, band, least)
    return np.concatenate(found)


def _keys(values: np.ndarray) -> np.ndarray:
    """One number for each band, uint64 [documents], in a sixth of the time that sorting its 16 bytes takes.

    Different bands may have one key: that makes more candidates, and `_near` compares the bands.
    """
    halves = np.ascontiguousarray(values).view(np.uint64)
    return halves[:, 0] * np.uint64(0x9E3779B97F4A7C15) ^ halves[:, 1]


def _all_pairs(order: np.ndarray, run: np.ndarray) -> Iterator[np.ndarray]:
    """Each pair of a run, for all runs at once: neighbours at a distance of 1, 2, ... that belong to the same run."""
    for distance in range(1, ALL_PAIRS):
        same = run[distance:] == run[:-distance]
        if not same.any():
            return
        yield np.stack([order[distance:][same], order[:-distance][same]], axis=1)


def _by_kind(run: np.ndarray, sketches: np.ndarray, members: np.ndarray, band: int, least: float) -> Iterator[np.ndarray]:
    """Each document with the first of its kind."""
    for _ in range(KINDS):
        if len(run) < 2:
            return
        pairs = np.stack([run[1:], np.full(len(run) - 1, run[0])], axis=1)
        compared = list(_near(pairs, sketches, members, band, least))
        yield from (pair for pair, _ in compared)
        run = run[1:][~np.concatenate([near for _, near in compared])]


def _near(pairs: np.ndarray, sketches: np.ndarray, members: np.ndarray, band: int, least: float) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """In blocks: the pairs whose estimate reaches `least` and that no earlier band has found; and which reach it at all."""
    for start in range(0, len(pairs), BLOCK):
        block = pairs[start : start + BLOCK]
        equal = sketches[members[block[:, 0]]] == sketches[members[block[:, 1]]]
        near = equal.mean(1) >= least
        before = equal[:, :band].reshape(len(block), band // BAND, BAND).all(2).any(1)
        yield block[near & equal[:, band : band + BAND].all(1) & ~before], near


def superfluous(
    sketches: np.ndarray,
    members: np.ndarray,
    threshold: float,
    text: Callable[[int], str],
    both_stay: Callable[[int, int], bool] = lambda _one, _other: False,
) -> dict[int, int]:
    """Document -> the one before it that it is a near-duplicate of, which stays; but for pairs that may both stay."""
    found: dict[int, int] = {}
    for later, earlier in candidates(sketches, members, threshold):
        document = int(members[later])
        for other in members[earlier].tolist():
            if other not in found and not both_stay(document, other) and similarity(text(document), text(other)) >= threshold:
                found[document] = other
                break
    return found


def near_pairs(sketches: np.ndarray, members: np.ndarray, threshold: float, text: Callable[[int], str]) -> Iterator[tuple[int, int]]:
    """(document, one before it) of each pair of near-duplicates; of those that hang together anyway, perhaps not each."""
    for later, earlier in candidates(sketches, members, threshold):
        document = int(members[later])
        for other in members[earlier].tolist():
            if similarity(text(document), text(other)) >= threshold:
                yield document, other


class Benchmark:
    """Texts that a model will be measured on."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._runs: set[int] = set()
        self._lengths: set[int] = set()
        self.texts = self.compared = 0
        for text in texts:
            self.texts += 1
            words = plain_words(text)
            length = min(RUN, len(words))
            if length >= SHORTEST_RUN:
                self.compared += 1
                self._lengths.add(length)
                self._runs.update(_runs(words, length))

    def run_in(self, text: str) -> str | None:
        """The first run of words that a text shares with the benchmark: 13 words, or a whole shorter benchmark text."""
        words = plain_words(text) if self._runs else []
        for length in sorted(self._lengths, reverse=True):
            for start, run in enumerate(_runs(words, length)):
                if run in self._runs:
                    return " ".join(words[start : start + length])
        return None


def plain_words(text: str) -> list[str]:
    """The words of a text without case and punctuation."""
    return words_of("".join(character if character.isalnum() else " " for character in text))


def _runs(words: Sequence[str], length: int) -> Iterator[int]:
    for start in range(len(words) - length + 1):
        yield hash(tuple(words[start : start + length]))


class Families:
    """Documents that belong together, as they are joined (union-find with path halving)."""

    def __init__(self, documents: int) -> None:
        self._parent = list(range(documents))

    def of(self, document: int) -> int:
        """The first document of the family."""
        parent = self._parent
        while parent[document] != document:
            parent[document] = parent[parent[document]]
            document = parent[document]
        return document

    def join(self, one: int, other: int) -> None:
        """Make two families one."""
        first, second = sorted((self.of(one), self.of(other)))
        self._parent[second] = first
