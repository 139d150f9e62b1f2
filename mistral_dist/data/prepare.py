"""Sources -> a data directory that training reads memory-mapped, at any position.

    rows ─► documents ─► spool ─► sift ─► shards
            on all cores           on a few columns

The rows stream through; what stays in memory is some 550 bytes a document, and 2 kB while they are sifted. The directory
is written aside and renamed, so that a prepared directory is whole or is not there.
"""

import fcntl
import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from mistral_dist.config import Recipe, digest
from mistral_dist.data import assignments, sources
from mistral_dist.data.audit import Audit, shape, written
from mistral_dist.data.cleaner import Cleaner, read_benchmarks
from mistral_dist.data.columns import Cleaned, entry
from mistral_dist.data.duplicates import Benchmark
from mistral_dist.data.encode import Encoder
from mistral_dist.data.example import Rejected, Row, from_record
from mistral_dist.data.prepared import FORMAT, Prepared, is_prepared, key, prepared_sources, read_manifest
from mistral_dist.data.shards import Spool, Writer
from mistral_dist.data.sift import DROPPED, Documents, Sifted, remembered, sift
from mistral_dist.data.split import SPLITS, TRAIN
from mistral_dist.data.workers import clean_all
from mistral_dist.errors import DataError
from mistral_dist.files import aside_of, asides_of, publish, write_text

Track = Callable[[Iterable[Any], str], Iterable[Any]]
"""Wraps an iterable to show progress under a description."""


def prepare(recipe: Recipe, encoder: Encoder, track: Track = lambda items, _what: items) -> Prepared:
    """Read, clean, sift, split and write; earlier assignments to splits in the same directory are kept.

    Raises DataError for a missing or unreadable source, too many bad rows, or an empty split.
    """
    target = recipe.data_dir
    sources.check(prepared_sources(recipe))
    _refuse_foreign(target)
    with _alone(target):
        aside = aside_of(target)
        aside.mkdir(parents=True)
        try:
            manifest = _make(recipe, encoder, aside, track)
            _refuse_foreign(target)
            publish(aside, target)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        _kept_quarantine(target).unlink(missing_ok=True)
    return Prepared(target, manifest)


def _make(recipe: Recipe, encoder: Encoder, folder: Path, track: Track) -> dict[str, Any]:
    """Write a data directory into `folder`; return its manifest."""
    seen = sources.state(prepared_sources(recipe))
    audit = Audit(folder / "quarantine.jsonl")
    spool = Spool(folder / "spool.arrow")
    try:
        gathered = _gather(recipe, encoder, audit, spool, track)
        groups = _groups(recipe, gathered.documents)
        known = assignments.read(recipe.data_dir, recipe)
        sifted = sift(gathered.documents, recipe.data, known)
        for document, reason, because in sifted.dropped:
            audit.drop(gathered.quarantined(document, Rejected(reason, because)))
        audit.refuse_bad(recipe.data.bad_rows, _kept_quarantine(recipe.data_dir))
        _refuse_empty(recipe, sifted, audit)
    except DataError:
        audit.close()
        shutil.copyfile(folder / "quarantine.jsonl", _kept_quarantine(recipe.data_dir))
        raise
    audit.close()
    facts = _write(folder, gathered, sifted, encoder.fingerprint, track)
    (folder / "spool.arrow").unlink()
    assignments.write(folder, remembered(known, gathered.documents, sifted, recipe.data))
    benchmark = {"texts": gathered.benchmark.texts, "compared": gathered.benchmark.compared}
    manifest = {**_counts(recipe, encoder, audit, seen, sifted), **facts, "groups": groups, "benchmark": benchmark}
    manifest |= shape(recipe, Prepared(folder, manifest))
    assert audit.total == sum(manifest["documents"].values()) + sum(audit.dropped.values()) + sum(audit.bad.values())
    write_text(folder / "audit.md", written(manifest, audit.samples, recipe))
    write_text(folder / "manifest.json", json.dumps(manifest, indent=2, ensure_ascii=False))
    return manifest


@contextmanager
def _alone(target: Path) -> Iterator[None]:
    """One preparation of a directory at a time; what a killed one left behind is put right first."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = open(target.parent / f".{target.name}.lock", "w")  # noqa: SIM115 - closed below
    except OSError as error:
        raise DataError(f"data.dir: {target}: cannot be written ({error.strerror}); set data.dir=... to a place that can") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"data.dir: {target}: is being prepared by another process; wait for it") from None
        for leftover in asides_of(target):
            if not target.exists() and read_manifest(leftover) is not None:
                leftover.rename(target)  # killed between the two renames: the data, and with them the assignments to splits
            else:
                shutil.rmtree(leftover, ignore_errors=True)
        yield


def _kept_quarantine(target: Path) -> Path:
    """Where the quarantine of a preparation that stopped is left."""
    return target.with_name(f"{target.name}-quarantine.jsonl")


def _refuse_foreign(target: Path) -> None:
    """What stands in the place of a data directory without being one is never removed."""
    if target.exists() and read_manifest(target) is None and (not target.is_dir() or any(target.iterdir())):
        raise DataError(f"data.dir: {target}: exists and holds something else; choose another data.dir or move it away")


# gather


@dataclass(frozen=True)
class Gathered:
    """All documents that are examples: their columns in memory, their records in the spool."""

    documents: Documents
    spool: Spool
    benchmark: Benchmark
    first_record: np.ndarray
    """int64 [documents + 1]: the records of document d are those from first_record[d] to first_record[d + 1]"""

    def quarantined(self, document: int, reason: Rejected) -> dict[str, Any]:
        """A line of the quarantine for a document."""
        place, source = _place(self.spool, self.first_record, document)
        return entry(place, source, reason, self.documents.text(document))


def _gather(recipe: Recipe, encoder: Encoder, audit: Audit, spool: Spool, track: Track) -> Gathered:
    """Read and clean all rows."""
    benchmark = read_benchmarks(recipe)
    cleaner = Cleaner(recipe, encoder, Benchmark(benchmark))
    rows = track(_rows(recipe), "reading, cleaning, measuring")
    columns: dict[str, list[Any]] = {name: [] for name in ("ids", "labels", "sources", "groups", "sketches", "records")}
    for found in clean_all(rows, cleaner, benchmark):
        audit.note(found.rows, found.changed, found.rejected)
        audit.refuse_bad(recipe.data.bad_rows, _kept_quarantine(recipe.data_dir), so_far=True)
        spool.write(found.batch)
        _append(columns, found, recipe)
    spool.finish()
    joined = {name: np.concatenate(parts) if parts else np.empty(0, np.int64) for name, parts in columns.items()}
    first_record = np.concatenate([[0], np.cumsum(joined.pop("records"))]).astype(np.int64)
    if not len(joined["ids"]):
        joined["sketches"] = np.empty((0, 0), np.uint32)

    def text(document: int) -> str:
        return _gist(spool, first_record, document)

    def place(document: int) -> str:
        return _place(spool, first_record, document)[0]

    return Gathered(Documents(**joined, text=text, place=place), spool, cleaner.benchmark, first_record)


def _groups(recipe: Recipe, documents: Documents) -> dict[str, dict[str, int]]:
    """How many groups each source has that names a column for them. Raises DataError where no row has a value there: a mistyped
    column would part what belongs together without a trace."""
    found = {}
    for number, source in enumerate(recipe.data.sources):
        own = documents.groups[documents.sources == number]
        if source.group is None or not is_prepared(source, recipe.data) or not len(own):
            continue
        named = own[own > 0]
        if not len(named):
            raise DataError(f"data.sources.{number}.group: no row has a value in the column {source.group!r}; name one that is there")
        found[str(number)] = {"documents": len(named), "groups": len(np.unique(named))}
    return found


def _rows(recipe: Recipe) -> Iterator[tuple[int, Row]]:
    """The rows to prepare: all, but those that training streams."""
    for index, source in enumerate(recipe.data.sources):
        if is_prepared(source, recipe.data):
            yield from ((index, row) for row in sources.read(source))


def _append(columns: dict[str, list[Any]], found: Cleaned, recipe: Recipe) -> None:
    labels = {label: number for number, label in enumerate(recipe.task.labels)}
    columns["labels"].append(np.array([labels.get(label, -1) for label in found.labels], np.int32))
    for name in ("ids", "sources", "groups", "sketches", "records"):
        columns[name].append(getattr(found, name))


def _gist(spool: Spool, first_record: np.ndarray, document: int) -> str:
    """The gist of a document. Its pieces are the parts of a text, or the last of them is the whole conversation."""
    first, end = int(first_record[document]), int(first_record[document + 1])
    text = "".join(spool.record(number, ["text"])["text"] for number in range(first, end))
    return text or from_record(spool.record(end - 1)).gist


def _place(spool: Spool, first_record: np.ndarray, document: int) -> tuple[str, int]:
    record = spool.record(int(first_record[document]), ["place", "source"])
    several = first_record[document + 1] - first_record[document] > 1
    return str(record["place"]).removesuffix(" part 1" if several else ""), int(record["source"])


# write


def _write(folder: Path, gathered: Gathered, sifted: Sifted, encoding: str, track: Track) -> dict[str, Any]:
    """Write the records of each split; return their counts and the fingerprint of their content."""
    splits = np.repeat(sifted.splits, np.diff(gathered.first_record))
    counts: dict[str, Any] = {what: dict.fromkeys(SPLITS, 0) for what in ("examples", "tokens", "targets")}
    labels: dict[str, Counter[str]] = {name: Counter() for name in SPLITS}
    content = {name: hashlib.sha256() for name in SPLITS}
    writers = {name: Writer(folder / name) for name in SPLITS}
    start = 0
    for batch in track(gathered.spool.batches(), "writing"):
        own = splits[start : start + batch.num_rows]
        start += batch.num_rows
        for number, name in enumerate(SPLITS):
            part = batch.filter(pa.array(own == number))
            if part.num_rows:
                writers[name].write(part)
                content[name].update(_identity(part))
                labels[name].update(label for label in part.column("label").to_pylist() if label)
                counts["examples"][name] += part.num_rows
                for what in ("tokens", "targets"):
                    counts[what][name] += int(part.column(what).to_numpy().sum())
    for writer in writers.values():
        writer.close()
    fingerprint = digest({"content": [content[name].hexdigest() for name in SPLITS], "encoding": encoding})
    return {**counts, "labels": {name: dict(sorted(labels[name].items())) for name in SPLITS}, "fingerprint": fingerprint}


def _identity(batch: pa.RecordBatch) -> bytes:
    """What training depends on, whatever file it came from."""
    columns = [batch.column(name).to_pylist() for name in ("id", "label", "source", "tokens", "targets", "messages")]
    return "".join(f"{one}\x1e" for one in zip(*columns, strict=True)).encode("utf-8", "surrogatepass")


def _refuse_empty(recipe: Recipe, sifted: Sifted, audit: Audit) -> None:
    wanted = {"validation": recipe.data.validation_fraction, "test": recipe.data.test_fraction}
    divided = any(source.into is None for source in recipe.data.sources) and not recipe.data.streaming
    for number, name in enumerate(SPLITS):
        own = name in [source.into for source in recipe.data.sources] and not (name == TRAIN and recipe.data.streaming)
        needed = own or (divided and (name == TRAIN or wanted[name] > 0))
        if needed and not (sifted.splits == number).any():
            dropped = "; ".join(audit.reasons()) or "none"
            kept = int((sifted.splits != DROPPED).sum())
            remedy = f"add data or set data.{name}_fraction=0" if divided and name != TRAIN else "add data"
            raise DataError(f"data: the {name} split is empty: {audit.total} rows read, {kept} kept, left out: {dropped}; {remedy}")


def _counts(recipe: Recipe, encoder: Encoder, audit: Audit, seen: dict[str, list[Any]], sifted: Sifted) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "key": key(recipe, encoder),
        "sources": seen,
        "split": assignments.rule(recipe.data),
        "rows": audit.total,
        "rows_by_source": {str(number): count for number, count in sorted(audit.rows.items())},
        "left_out_by_source": {str(number): count for number, count in sorted(audit.left_out.items())},
        "streaming": recipe.data.streaming,
        "changed": dict(sorted(audit.changed.items())),
        "bad": dict(audit.bad.most_common()),
        "dropped": dict(audit.dropped.most_common()),
        "documents": {name: int((sifted.splits == number).sum()) for number, name in enumerate(SPLITS)},
        "leakage": sifted.leakage,
    }
