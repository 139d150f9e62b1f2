"""What became of each row: counted while `prepare` runs, and told so that a person can judge the data.

The counts add up: rows read = documents kept + rows left out, by reason.
"""

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from mistral_dist.config import Recipe
from mistral_dist.data.prepared import Prepared, is_prepared
from mistral_dist.data.remote import shown
from mistral_dist.data.split import SPLITS, TRAIN
from mistral_dist.data.stream import Plan
from mistral_dist.errors import DataError

SAMPLES = 3
"""Rows shown for each reason."""
SHOWN = 4
"""Reasons named in the line that stops `prepare`."""
LEAST = 1000
"""Rows after which nothing but bad ones means that the recipe, not the data, is wrong."""


class Audit:
    """Counts rows, and writes those that are left out to a quarantine file."""

    def __init__(self, quarantine: Path) -> None:
        # a file's name may be no UTF-8, and stands in the places; the escapes are JSON's own
        self._file = open(quarantine, "w", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115 - closed by `close`
        self.rows: Counter[int] = Counter()
        self.changed: Counter[str] = Counter()
        self.dropped: Counter[str] = Counter()
        self.bad: Counter[str] = Counter()
        self.left_out: Counter[int] = Counter()
        """Rows left out, by source."""
        self.samples: dict[str, list[dict[str, Any]]] = {}

    def note(self, rows: Counter[int], changed: Counter[str], rejected: Iterable[dict[str, Any]]) -> None:
        """Count a chunk of rows."""
        self.rows.update(rows)
        self.changed.update({kind: count for kind, count in changed.items() if count})
        for found in rejected:
            self.drop(found)

    def drop(self, found: dict[str, Any]) -> None:
        """Count and keep a row that is left out."""
        reason = found["reason"]
        self.left_out[found["source"]] += 1
        (self.bad if found.get("bad") else self.dropped)[reason] += 1
        samples = self.samples.setdefault(reason, [])
        if len(samples) < SAMPLES:
            samples.append(found)
        self._file.write(json.dumps(found, ensure_ascii=False) + "\n")

    def close(self) -> None:
        """Finish the quarantine file."""
        self._file.close()

    @property
    def total(self) -> int:
        """Rows read."""
        return sum(self.rows.values())

    def refuse_bad(self, share: float, kept_at: Path, *, so_far: bool = False) -> None:
        """Raise DataError where more than this share of the rows is unreadable or no example.

        `so_far`: there are more to come; only where nothing but bad rows came is that enough.
        """
        bad = sum(self.bad.values())
        if bad <= share * self.total or (so_far and (bad < self.total or bad < LEAST)):
            return
        reasons = "; ".join(self.reasons(min(SHOWN, len(self.bad))))
        others = sum(count for _, count in self.bad.most_common()[SHOWN:])
        reasons += f"; and {others:,} others" if others else ""
        remedy = f"mend them, or raise data.bad_rows; all are in {kept_at}"
        raise DataError(f"data.bad_rows={share:g}: {bad:,} of {self.total:,} rows are no examples: {reasons}; {remedy}")

    def reasons(self, most: int | None = None) -> list[str]:
        """Why rows were left out, each reason with its count and its first row; what is no example first."""
        found = [*self.bad.most_common(), *self.dropped.most_common()][:most]
        return [
            f"{count:,} {reason} (first {self.samples[reason][0]['place']}: {self.samples[reason][0]['because']})"
            for reason, count in found
        ]


def shape(recipe: Recipe, prepared: Prepared) -> dict[str, Any]:
    """Lengths in tokens by split, and what training will make of them."""
    found: dict[str, Any] = {"lengths": {name: _percentiles(prepared.column(name, "tokens")) for name in SPLITS}}
    tokens = prepared.column(TRAIN, "tokens")
    if len(tokens):
        weights = prepared.weights(TRAIN, recipe.data.sources)
        batch, capacity = recipe.train.global_batch_size, recipe.data.max_length
        plan = Plan(tokens, capacity=capacity, seed=recipe.train.seed, epochs=1, global_batch_size=batch, weights=weights)
        packed = sum(int(tokens[plan.pack(number)].sum()) for number in range(plan.packs))
        found["plan"] = {
            "packs_per_epoch": plan.packs,
            "steps_per_epoch": plan.steps,
            "fill": round(packed / max(1, plan.packs * capacity), 4),
        }
    return found


def _percentiles(values: np.ndarray) -> dict[str, int]:
    if not len(values):
        return {}
    names = {"min": 0, "p10": 10, "p50": 50, "p90": 90, "p99": 99, "max": 100}
    return {name: int(np.percentile(values, at)) for name, at in names.items()} | {"mean": int(values.mean())}


def written(manifest: dict[str, Any], samples: dict[str, list[dict[str, Any]]], recipe: Recipe) -> str:
    """The audit as Markdown."""
    kept = sum(manifest["documents"].values())
    lines = [
        f"# Data of {recipe.data_dir.name}",
        "",
        f"{manifest['rows']:,} rows read, {kept:,} documents kept ({kept / max(1, manifest['rows']):.1%}).",
    ]
    lines += [f"For {recipe.model.name}, task {recipe.task.kind}, split with seed {recipe.data.seed}."]
    lines += _sources_table(manifest, recipe)
    lines += _splits_table(manifest)
    lines += _lengths_table(manifest, recipe)
    lines += _groups(manifest, recipe)
    lines += ["", "## Leakage between the splits", ""]
    lines += [f"- {what}: {count}" for what, count in manifest["leakage"].items()]
    lines += ["- the streamed train data: not compared; give a stream what cannot be in its test"] if recipe.data.streaming else []
    lines += ["", "## Repaired", "", *([f"- {kind}: {count:,} documents" for kind, count in manifest["changed"].items()] or ["Nothing."])]
    lines += ["", "## Left out", ""]
    left_out = {**manifest["bad"], **manifest["dropped"]}
    told = "All of them, with their reasons, are in quarantine.jsonl. Those that are no example count towards data.bad_rows."
    lines += [told if left_out else "Nothing."]
    for reason, count in sorted(left_out.items(), key=lambda item: -item[1]):
        bad = " (no example)" if reason in manifest["bad"] else ""
        lines += ["", f"### {reason}{bad}: {count:,}", ""]
        lines += [f"- `{one['place']}` {one['because']}: {_short(one['text'])}" for one in samples.get(reason, [])]
    return "\n".join(lines) + "\n"


def _sources_table(manifest: dict[str, Any], recipe: Recipe) -> list[str]:
    lines = ["", "## Sources", "", "| source | rows | left out | into | weight |", "|---|---:|---:|---|---:|"]
    for number, source in enumerate(recipe.data.sources):
        rows = manifest["rows_by_source"].get(str(number), 0)
        name = shown(source.path) if source.path is not None else source.name
        left_out = manifest["left_out_by_source"].get(str(number), 0)
        into = (source.into or "divided") if is_prepared(source, recipe.data) else "streamed, not read here"
        lines.append(f"| {name} | {rows:,} | {left_out:,} | {into} | {source.weight:g} |")
    if recipe.data.benchmarks:
        found = manifest["benchmark"]
        lines += ["", f"Compared with {found['compared']:,} of {found['texts']:,} texts of the benchmarks (those of 5 words and more)."]
    return lines


def _groups(manifest: dict[str, Any], recipe: Recipe) -> list[str]:
    lines = []
    for number, found in manifest["groups"].items():
        column = recipe.data.sources[int(number)].group
        lines.append(f"- source {int(number) + 1}, column `{column}`: {found['documents']:,} documents in {found['groups']:,} groups")
    return ["", "## Groups", "", *lines] if lines else []


def _splits_table(manifest: dict[str, Any]) -> list[str]:
    lines = ["", "## Splits", "", "| | " + " | ".join(SPLITS) + " |", "|---|" + "---:|" * len(SPLITS)]
    total = max(1, sum(manifest["documents"].values()))
    shares = (f"{manifest['documents'][name]:,} ({manifest['documents'][name] / total:.1%})" for name in SPLITS)
    lines.append("| documents | " + " | ".join(shares) + " |")
    for what in ("examples", "tokens", "targets"):
        lines.append(f"| {what} | " + " | ".join(f"{manifest[what][name]:,}" for name in SPLITS) + " |")
    labels = sorted({label for name in SPLITS for label in manifest["labels"][name]})
    for label in labels:
        lines.append(f"| label {label} | " + " | ".join(f"{manifest['labels'][name].get(label, 0):,}" for name in SPLITS) + " |")
    return lines


def _lengths_table(manifest: dict[str, Any], recipe: Recipe) -> list[str]:
    names = ("min", "p10", "p50", "p90", "p99", "max", "mean")
    lines = ["", "## Lengths, in tokens", "", "| | " + " | ".join(names) + " |", "|---|" + "---:|" * len(names)]
    for name in SPLITS:
        found = manifest["lengths"][name]
        if found:
            lines.append(f"| {name} | " + " | ".join(f"{found[key]:,}" for key in names) + " |")
    plan = manifest.get("plan")
    if plan is not None:
        packs = f"{plan['packs_per_epoch']:,} packs of {recipe.data.max_length:,} tokens, {plan['fill']:.1%} full"
        lines += ["", f"An epoch is {packs}; with {recipe.train.global_batch_size} packs a step that is {plan['steps_per_epoch']:,} steps."]
    return lines


def _short(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= 100 else flat[:100] + " ..."
