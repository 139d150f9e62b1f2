"""The whole way of a row: read, repaired, filtered, encoded, fitted into packs. The same for `prepare` and for streams."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from mistral_dist.config import Recipe
from mistral_dist.data import sources
from mistral_dist.data.clean import tidy
from mistral_dist.data.duplicates import Benchmark
from mistral_dist.data.encode import Encoder
from mistral_dist.data.example import BadRow, Example, Rejected, Row
from mistral_dist.data.fit import Piece, fit
from mistral_dist.data.rows import benchmark_texts, read_example
from mistral_dist.errors import MistralDistError


@dataclass(frozen=True, slots=True)
class Document:
    """An example that can be trained on, in pieces that fit."""

    example: Example
    pieces: list[Piece]
    changes: list[str]
    """What was repaired."""

    @property
    def id(self) -> str:
        """The example's id; its pieces know it."""
        return self.pieces[0].id.partition("-")[0]


@dataclass(frozen=True)
class Cleaner:
    """Turns rows into documents."""

    recipe: Recipe
    encoder: Encoder
    benchmark: Benchmark

    @classmethod
    def of(cls, recipe: Recipe, encoder: Encoder) -> Self:
        """The cleaner of a recipe, with its benchmarks read. Raises DataError where one cannot be read."""
        return cls(recipe, encoder, Benchmark(read_benchmarks(recipe)))

    def documents(self, rows: Sequence[tuple[int, Row]]) -> list[Document | Rejected]:
        """What each row became; `rows`: (its source's place in the recipe, the row). No row stops the others.

        Raises DataError for an example that is too long where the recipe says `data.overlong: error`.
        """
        read = [self._read(source, row) for source, row in rows]
        examples = [found[0] for found in read if not isinstance(found, Rejected)]
        fitted = iter(self._fitted(examples))
        return [found if isinstance(found, Rejected) else _document(*found, next(fitted)) for found in read]

    def _read(self, source: int, row: Row) -> tuple[Example, list[str]] | Rejected:
        content = ""
        try:
            read = read_example(row, self.recipe.task, self.recipe.data.sources[source], source)
            content = read.gist
            example, changes = tidy(read, self.recipe.data)
            self._refuse_benchmark(example)
            return example, changes
        except Rejected as reason:
            reason.text = content
            return reason
        except (MistralDistError, MemoryError):  # not the row's fault, or what the recipe wants to stop at
            raise
        except Exception as error:  # nobody foresees what rows may hold, and one must not stop the others
            return _unreadable(error, content)

    def _fitted(self, examples: Sequence[Example]) -> list[list[Piece] | Rejected]:
        """The pieces of each example, or why it has none."""
        try:
            return fit(examples, self.encoder, self.recipe.data)
        except (MistralDistError, MemoryError):
            raise
        except Exception as error:  # of one of them; the others have theirs
            if len(examples) == 1:
                return [_unreadable(error)]
            return [found for example in examples for found in self._fitted([example])]

    def _refuse_benchmark(self, example: Example) -> None:
        """What may be trained on must not say what a benchmark asks; validation and test examples may."""
        if self.recipe.data.sources[example.source].into in (None, "train"):
            run = self.benchmark.run_in(example.content)
            if run is not None:
                raise Rejected("in_benchmark", f"shares {run!r} with a benchmark")


def _document(example: Example, changes: list[str], pieces: list[Piece] | Rejected) -> Document | Rejected:
    if isinstance(pieces, Rejected):
        pieces.text = example.gist
        return pieces
    return Document(example, pieces, changes)


def _unreadable(error: Exception, text: str = "") -> BadRow:
    """What the readers did not foresee, in one line that can be written."""
    because = " ".join(f"{type(error).__name__}: {error}".split())[:200].encode("utf-8", "backslashreplace").decode()
    bad = BadRow("unreadable", because)
    bad.text = text
    return bad


def read_benchmarks(recipe: Recipe) -> list[str]:
    """The texts of the recipe's benchmarks. Raises DataError where one cannot be read."""
    return [text for source in recipe.data.benchmarks for row in sources.read(source) for text in benchmark_texts(row)]
