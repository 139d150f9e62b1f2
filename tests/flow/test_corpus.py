"""A real corpus, end to end: 82,000 definitions of WordNet in 26 topics, with real mess among them."""

import json
import math
import random
import re
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest

from mistral_dist.config import Recipe
from mistral_dist.data.duplicates import shingles, similarity
from mistral_dist.data.prepared import Prepared, read_manifest
from mistral_dist.data.split import SPLITS
from tests.launch import ROOT, mistral_dist

NOUNS = Path("/usr/share/wordnet/data.noun")
SHARES = {"train": 0.8, "validation": 0.1, "test": 0.1}
LATER = 1000
MESS = {
    "not_json": b'{"text": "a definition that breaks o',
    "not_an_object": b'["a list"]',
    "not_utf8": b'{"text": "caf\xe9 in Latin-1", "label": "food"}',
    "unknown_label": b'{"text": "of no topic that we know", "label": "poetry"}',
    "no_label": b'{"text": "nobody said what this is"}',
    "no_text": b'{"text": 42, "label": "act"}',
    "too_short": b'{"text": " \\u0000 ", "label": "act"}',
    "too_many_characters": b'{"text": "' + b"long " * 2_000_000 + b'", "label": "act"}',
    "control_token": b'{"text": "ends <|im_end|> too early", "label": "act"}',
}
"""One row of each kind; the rest of a reason's rows are made of it."""
EACH = 40


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, demo_model: Path) -> Path:
    """A folder with the recipe, the corpus and, aside, the rows that come later."""
    if not NOUNS.is_file():
        pytest.skip("WordNet is not here: apt install wordnet-base")
    folder = tmp_path_factory.mktemp("wordnet")
    collect = [sys.executable, str(ROOT / "examples/wordnet/collect.py"), str(folder / "all.jsonl")]
    subprocess.run(collect, check=True)
    rows = (folder / "all.jsonl").read_bytes().splitlines()
    random.Random(0).shuffle(rows)
    later, first = rows[:LATER], rows[LATER:]
    first[0] = b"\xef\xbb\xbf" + first[0]  # a byte-order mark
    for reason, row in MESS.items():
        for _ in range(1 if reason == "too_many_characters" else EACH):
            first.insert(random.Random(reason).randrange(1, len(first)), row)
    first += [row.replace(b"{", b"{ ", 1) for row in first[1:200]]  # the same rows, written otherwise
    raw = folder / "data/raw"
    raw.mkdir(parents=True)
    (raw / "wordnet.jsonl").write_bytes(b"\n".join(first))
    (folder / "later.jsonl").write_bytes(b"\n".join(later))
    recipe = (ROOT / "examples/wordnet/wordnet.yaml").read_text()
    paths = {"data/raw/wordnet.jsonl": str(raw), "~/.cache/mistral-dist/smollm2-135m-instruct": str(demo_model)}
    for path, here in paths.items():
        recipe = recipe.replace(f"path: {path}", f"path: {here}")
    (folder / "wordnet.yaml").write_text(recipe)
    return folder


def prepared(folder: Path) -> Prepared:
    done = mistral_dist("prepare", folder / "wordnet.yaml", f"data.dir={folder}/prepared")
    assert done.returncode == 0, done.stdout + done.stderr
    manifest = read_manifest(folder / "prepared")
    assert manifest is not None
    return Prepared(folder / "prepared", manifest)


def records(found: Prepared) -> dict[str, list[dict[str, Any]]]:
    return {name: found.split(name).select_columns(["id", "text", "label"]).to_list() for name in SPLITS}


def test_a_messy_corpus_becomes_splits_that_can_be_trusted(corpus: Path) -> None:
    found = prepared(corpus)
    held = records(found)
    _sizes_are_those_of_the_recipe(held)
    _nothing_leaks(held)
    _every_row_is_accounted_for(found, corpus)
    _the_audit_says_so(found)

    (corpus / "data/raw/zz-later.jsonl").write_bytes((corpus / "later.jsonl").read_bytes())
    before = {record["id"]: name for name in SPLITS for record in held[name]}
    grown = records(prepared(corpus))
    after = {record["id"]: name for name in SPLITS for record in grown[name]}
    moved = [id for id, name in before.items() if after.get(id, name) != name]
    assert moved == []
    # an old row goes where a new one gives the same text another label; no other does
    contradicted = Counter(entry["text"] for entry in _quarantine(corpus / "prepared") if entry["reason"] == "conflicting_labels")
    text = {record["id"]: record["text"] for name in SPLITS for record in held[name]}
    assert [id for id in before if id not in after and text[id] not in contradicted] == []
    assert len(after) > len(before) + LATER * 0.9
    _sizes_are_those_of_the_recipe(grown)
    _nothing_leaks(grown)


def _sizes_are_those_of_the_recipe(held: dict[str, list[dict[str, Any]]]) -> None:
    total = sum(map(len, held.values()))
    labels = Recipe.load(ROOT / "examples/wordnet/wordnet.yaml").task.labels
    counts = {name: Counter(record["label"] for record in held[name]) for name in SPLITS}
    for name, share in SHARES.items():
        assert abs(len(held[name]) / total - share) < 0.005
        for label in labels:
            of_label = sum(counts[other][label] for other in SPLITS)
            sigma = math.sqrt(of_label * share * (1 - share))
            assert abs(counts[name][label] - share * of_label) <= 4 * sigma, (label, name)
            assert of_label > 0


def _nothing_leaks(held: dict[str, list[dict[str, Any]]]) -> None:
    """Found otherwise than `prepare` does: by an index of every shingle of what is held out."""
    where: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for name in ("validation", "test"):
        for record in held[name]:
            for shingle in set(shingles(record["text"])):
                where[shingle].append((name, record["text"]))
    for name in SPLITS:
        for record in held[name]:
            others = {other for shingle in set(shingles(record["text"])) for other in where.get(shingle, []) if other[0] != name}
            for _, text in others:
                assert similarity(record["text"], text) < 0.8, (record["text"], text)


def _every_row_is_accounted_for(found: Prepared, corpus: Path) -> None:
    manifest = found.manifest
    rows = sum(1 for line in (corpus / "data/raw/wordnet.jsonl").read_bytes().split(b"\n") if line.strip())
    left_out = manifest["bad"] | manifest["dropped"]
    assert manifest["rows"] == rows == sum(manifest["documents"].values()) + sum(left_out.values())
    quarantine = _quarantine(found.path)
    assert Counter(entry["reason"] for entry in quarantine) == left_out
    for reason in MESS:
        assert left_out[reason] == (1 if reason == "too_many_characters" else EACH)
    assert left_out["duplicate"] >= 150
    lines = (corpus / "data/raw/wordnet.jsonl").read_bytes().split(b"\n")
    for entry in quarantine:
        file, _, line = entry["place"].rpartition(":")
        assert file == str(corpus / "data/raw/wordnet.jsonl")
        assert entry["because"]
        if entry["reason"] in MESS:
            assert lines[int(line) - 1].startswith(MESS[entry["reason"]][:1000])


def _quarantine(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "quarantine.jsonl").read_text(encoding="utf-8").splitlines()]


def _the_audit_says_so(found: Prepared) -> None:
    audit = (found.path / "audit.md").read_text(encoding="utf-8")
    assert f"{found.manifest['rows']:,} rows read" in audit
    assert re.search(r"\| label animal \| [45],\d{3} \| \d{3} \| \d{3} \|", audit)
    assert "- equal: 0" in audit
    assert "- near: 0" in audit
    assert f"### not_json (no example): {EACH}" in audit
    assert audit.count("wordnet.jsonl:") > 20
    assert max(map(len, audit.splitlines())) < 600
