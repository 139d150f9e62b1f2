"""Sources -> a data directory that training reads memory-mapped, at any position.

    data/<name>/
      train/ validation/ test/   Arrow shards: id, document, place, text, label, messages, ends, tokens, targets
      quarantine.jsonl           every row that was dropped: place, reason, what it collided with
      manifest.json              counts that add up, what went in, fingerprints

The directory is written aside and renamed, so that a prepared directory is whole or is not there. `tokens` and `targets`
are the lengths under the recipe's tokenizer and template; with them the order of training needs no text. For now the
examples are held in memory while they are prepared.
"""

import fcntl
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from mistral_dist.config import Recipe, digest
from mistral_dist.data import sources
from mistral_dist.data.clean import Audit, clean
from mistral_dist.data.encode import Encoded, Encoder
from mistral_dist.data.example import BadRow, Example, to_record
from mistral_dist.data.split import SPLITS, TRAIN, split
from mistral_dist.errors import DataError
from mistral_dist.files import ASIDE, aside_of, publish, read_json

FORMAT = 1
"""Of the data directory; a new one is prepared again."""
Track = Callable[[Iterable[Any], str], Iterable[Any]]
"""Wraps an iterable to show progress under a description."""

FEATURES = datasets.Features(
    {
        "id": datasets.Value("string"),
        "document": datasets.Value("string"),
        "place": datasets.Value("string"),
        "text": datasets.Value("string"),
        "label": datasets.Value("string"),
        "ends": datasets.Value("bool"),
        "messages": datasets.Value("string"),
        "tools": datasets.Value("string"),
        "source": datasets.Value("int32"),
        "tokens": datasets.Value("int32"),
        "targets": datasets.Value("int32"),
    }
)


@dataclass(frozen=True)
class Prepared:
    """A data directory that fits the recipe."""

    path: Path
    manifest: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        """Changes when the examples, their order in the shards, or their encoding change."""
        return str(self.manifest["fingerprint"])

    def split(self, name: str) -> datasets.Dataset:
        """One split, memory-mapped."""
        if not self.manifest["examples"][name]:  # `datasets` writes such a one, but cannot read it
            return datasets.Dataset.from_dict({column: [] for column in FEATURES}, features=FEATURES)
        return datasets.load_from_disk(str(self.path / name))

    def lengths(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, targets) of each example of a split, int32 [examples]."""
        table = self.split(name).data
        return table.column("tokens").to_numpy(), table.column("targets").to_numpy()


def prepare(recipe: Recipe, encoder: Encoder, track: Track = lambda items, _what: items) -> Prepared:
    """Read, clean, split, measure and write; earlier assignments to splits in the same directory are kept.

    Raises DataError for a missing or unreadable source, a row that is no example, or an empty split.
    """
    sources.check(recipe.data.sources)
    _refuse_foreign(recipe.data_dir)
    data = recipe.data
    with _alone(recipe.data_dir):
        seen = sources.state(data.sources)
        audit = Audit()
        examples = clean(track(sources.read(data.sources), "reading and cleaning"), recipe.task, data, audit)
        where = split(examples, data.validation_fraction, data.test_fraction, data.seed, _assigned(recipe))
        measured = list(_measured(track(examples, "measuring tokens"), recipe, encoder, audit))
        records = {name: [record for record in measured if where[record["document"]] == name] for name in SPLITS}
        _refuse_empty(recipe, records, audit)
        return _write(recipe, encoder, audit, records, seen)


@contextmanager
def _alone(target: Path) -> Iterator[None]:
    """One preparation of a directory at a time; what a killed one left behind is put right first."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.parent / f".{target.name}.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"data.dir: {target}: is being prepared by another process; wait for it") from None
        for leftover in sorted(target.parent.glob(f"{ASIDE}{target.name}-*")):
            if not target.exists() and read_manifest(leftover) is not None:
                leftover.rename(target)  # killed between the two renames: the data, and with them the assignments to splits
            else:
                shutil.rmtree(leftover, ignore_errors=True)
        yield


def open_prepared(recipe: Recipe, encoder: Encoder) -> Prepared:
    """The recipe's data directory. Raises DataError, naming the command, where it is missing or of another recipe."""
    manifest = read_manifest(recipe.data_dir)
    remedy = "run `mistral-dist prepare` with this recipe and these overrides"
    if manifest is None:
        raise DataError(f"data.dir: {recipe.data_dir}: no prepared data there; {remedy} first")
    if manifest["key"] != _key(recipe, encoder):
        other = "prepared with another data or task section, tokenizer or version"
        raise DataError(f"data.dir: {recipe.data_dir}: {other}; {remedy} to replace it, or set data.dir=... to keep both")
    return Prepared(recipe.data_dir, manifest)


def sources_changed(recipe: Recipe, prepared: Prepared) -> bool:
    """Whether a local source file was added, removed or written to since the data were prepared."""
    return bool(prepared.manifest["sources"] != sources.state(recipe.data.sources))


def is_current(recipe: Recipe, encoder: Encoder) -> bool:
    """Whether the recipe's data directory is what `prepare` would make of it now."""
    manifest = read_manifest(recipe.data_dir)
    return manifest is not None and manifest["key"] == _key(recipe, encoder) and manifest["sources"] == sources.state(recipe.data.sources)


def read_manifest(path: Path) -> dict[str, Any] | None:
    """The manifest of a data directory, or None where there is none."""
    return read_json(path / "manifest.json")


def _key(recipe: Recipe, encoder: Encoder) -> str:
    """What decides the content of a data directory, beside the sources themselves."""
    data = recipe.data.model_dump(mode="json", exclude={"dir"})
    return digest({"format": FORMAT, "task": recipe.task.model_dump(mode="json"), "data": data, "encoding": encoder.fingerprint})


def _assigned(recipe: Recipe) -> dict[str, str]:
    """Earlier assignments in this directory, where they were made with the same seed and shares."""
    manifest = read_manifest(recipe.data_dir)
    if manifest is None or manifest["split"] != _split_rule(recipe):
        return {}
    earlier = Prepared(recipe.data_dir, manifest)
    return {document: name for name in SPLITS for document in earlier.split(name)["document"]}


def _split_rule(recipe: Recipe) -> dict[str, Any]:
    return {
        "seed": recipe.data.seed,
        "validation_fraction": recipe.data.validation_fraction,
        "test_fraction": recipe.data.test_fraction,
    }


def _measured(examples: Iterable[Example], recipe: Recipe, encoder: Encoder, audit: Audit) -> Iterator[dict[str, Any]]:
    """Records with their lengths; over-long examples are cut into pieces (pretrain), dropped and counted, or refused."""
    capacity = recipe.data.max_length
    for example in examples:
        token = encoder.control_token_in(example)
        if token is not None:
            audit.drop(example, "control_token", f"holds {token!r}, which would end a turn or begin one")
            continue
        if recipe.task.kind == "pretrain":
            yield from _pieces(example, capacity, encoder)
            continue
        try:
            encoded = encoder.encode(example)
        except BadRow as bad:
            audit.drop(example, bad.reason, bad.because)
            continue
        if len(encoded.ids) <= capacity:
            yield _record(example, example.id, example.id, encoded)
        elif recipe.data.overlong == "drop":
            audit.drop(example, "too_long", f"{len(encoded.ids)} tokens, data.max_length is {capacity}")
        else:
            raise DataError(
                f"{example.place}: {len(encoded.ids)} tokens, but data.max_length is {capacity};"
                " raise it, shorten the example, or set data.overlong=drop"
            )


def _pieces(example: Example, capacity: int, encoder: Encoder) -> Iterator[dict[str, Any]]:
    """Records of a text, cut between characters where it is longer than a pack; put together they are the text."""
    whole = encoder.encode(example)
    if len(whole.ids) <= capacity:
        yield _record(example, example.id, example.id, whole)
        return
    texts = list(_cut(example, example.text, capacity, encoder))
    for number, text in enumerate(texts, 1):
        piece = replace(example, place=f"{example.place} part {number}", text=text, ends=number == len(texts))
        yield _record(piece, f"{example.id}-{number}", example.id, encoder.encode(piece))


def _cut(example: Example, text: str, capacity: int, encoder: Encoder) -> Iterator[str]:
    """Parts of a text of at most `capacity` tokens each, begin and end included, and of about the same length."""
    if len(encoder.encode(replace(example, text=text)).ids) <= capacity:
        yield text
        return
    spans = encoder.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    # one character may be several tokens with the same offset: only where the offset moves is a place to cut
    places = [start for (before, _), (start, _) in pairwise(spans) if start > before]
    if not places:
        raise DataError(f"{example.place}: data.max_length={capacity} does not hold a single character of it; raise data.max_length")
    # tokenized alone, a part may have a token more than it had inside the text: two spare beside begin and end
    parts = -(-len(spans) // max(1, capacity - 4))
    edges = sorted({0, *(places[len(places) * part // parts] for part in range(1, parts)), len(text)})
    for begin, end in pairwise(edges):
        yield from _cut(example, text[begin:end], capacity, encoder)


def _record(example: Example, name: str, document: str, encoded: Encoded) -> dict[str, Any]:
    return {
        "id": name,
        "document": document,
        **to_record(example),
        "tokens": len(encoded.ids),
        "targets": len(encoded.targets),
    }


def _refuse_empty(recipe: Recipe, records: Mapping[str, Sequence[Any]], audit: Audit) -> None:
    wanted = {"validation": recipe.data.validation_fraction, "test": recipe.data.test_fraction}
    for name in SPLITS:
        if not records[name] and (name == TRAIN or wanted[name] > 0):
            kept = sum(map(len, records.values()))
            dropped = ", ".join(f"{count} {reason}" for reason, count in audit.dropped.items()) or "none"
            remedy = "add data" if name == TRAIN else f"add data or set data.{name}_fraction=0"
            raise DataError(f"data: the {name} split is empty: {audit.rows} rows read, {kept} kept, dropped {dropped}; {remedy}")


def _write(
    recipe: Recipe, encoder: Encoder, audit: Audit, records: dict[str, list[dict[str, Any]]], seen: dict[str, list[int]]
) -> Prepared:
    target = recipe.data_dir
    aside = aside_of(target)
    aside.mkdir(parents=True)
    try:
        for name in SPLITS:
            columns = {column: [record[column] for record in records[name]] for column in FEATURES}
            datasets.Dataset.from_dict(columns, features=FEATURES).save_to_disk(str(aside / name))
        with open(aside / "quarantine.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps(entry, ensure_ascii=False) + "\n" for entry in audit.quarantine)
        manifest = _manifest(recipe, encoder, audit, records, seen)
        (aside / "manifest.json").write_text(json.dumps(manifest, indent=2, ensure_ascii=False), encoding="utf-8")
        _refuse_foreign(target)
        publish(aside, target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return Prepared(target, manifest)


def _refuse_foreign(target: Path) -> None:
    """What stands in the place of a data directory without being one is never removed."""
    if target.exists() and read_manifest(target) is None and (not target.is_dir() or any(target.iterdir())):
        raise DataError(f"data.dir: {target}: exists and holds something else; choose another data.dir or move it away")


def _manifest(
    recipe: Recipe, encoder: Encoder, audit: Audit, records: dict[str, list[dict[str, Any]]], seen: dict[str, list[int]]
) -> dict[str, Any]:
    documents = {name: len({record["document"] for record in records[name]}) for name in SPLITS}
    dropped = dict(sorted(audit.dropped.items()))
    kept, lost = sum(documents.values()), sum(dropped.values())
    assert audit.rows == kept + lost, f"{audit.rows} rows read, but {kept} kept and {lost} dropped"
    order = [[record["id"], record["label"], record["tokens"], record["targets"]] for name in SPLITS for record in records[name]]
    return {
        "format": FORMAT,
        "key": _key(recipe, encoder),
        "fingerprint": digest({"order": order, "encoding": encoder.fingerprint}),
        "sources": seen,
        "split": _split_rule(recipe),
        "rows": audit.rows,
        "repaired": audit.repaired,
        "dropped": dropped,
        "documents": documents,
        "examples": {name: len(records[name]) for name in SPLITS},
        "labels": {name: dict(sorted(Counter(r["label"] for r in records[name] if r["label"]).items())) for name in SPLITS},
        "tokens": {name: sum(record["tokens"] for record in records[name]) for name in SPLITS},
        "targets": {name: sum(record["targets"] for record in records[name]) for name in SPLITS},
    }
