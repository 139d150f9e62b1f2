"""Ranks that differ: other code, libraries, recipe, seed or data on one machine would spoil a run, and no one would know."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import mistral_dist
from mistral_dist.config import Recipe, leaves

SHOWN = 5
"""Differences that a message names."""
PLACES = ("data.dir", "model.path")
"""Fields of a recipe that each machine may have for itself; what is found there is compared by content."""


def code_fingerprint(folder: Path | None = None) -> str:
    """Of the Python files of this package (or of a folder), by content: first 16 hex digits of a SHA-256."""
    root = folder or Path(mistral_dist.__file__).parent
    digest = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        content = file.read_bytes()
        digest.update(f"{file.relative_to(root).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:16]


def recipe_facts(recipe: Recipe) -> dict[str, str]:
    """Each field of the resolved recipe, the seeds among them, with its value as JSON."""
    return {key: json.dumps(value) for key, value in leaves(recipe.model_dump(mode="json")) if key not in PLACES}


def drift(ranks: Sequence[Mapping[str, str]], hosts: Sequence[str]) -> str | None:
    """Which ranks differ from most, in what, with both values; None where all are the same.

    `ranks`: what each rank found, name -> value; `hosts`: their machines.
    """
    names = sorted({name for rank in ranks for name in rank})
    values = {name: [rank.get(name, "nothing") for rank in ranks] for name in names}
    usual = {name: _most(values[name]) for name in names}
    found: dict[tuple[str, ...], list[int]] = {}
    for rank in range(len(ranks)):
        odd = [name for name in names if values[name][rank] != usual[name]]
        words = [f"{name} is {values[name][rank]} (on rank {values[name].index(usual[name])}: {usual[name]})" for name in odd]
        if words:
            found.setdefault(tuple(words), []).append(rank)
    return "; ".join(_sentences(found, hosts)) or None


def _most(values: Sequence[str]) -> str:
    """The most frequent value; of several, the one of the lowest rank."""
    return max(values, key=values.count)


def _sentences(found: Mapping[tuple[str, ...], Sequence[int]], hosts: Sequence[str]) -> Iterator[str]:
    for odd, ranks in found.items():
        where = ", ".join(sorted({hosts[rank] for rank in ranks}))
        more = f" and {len(odd) - SHOWN} more" if len(odd) > SHOWN else ""
        yield f"rank{'s'[: len(ranks) > 1]} {', '.join(map(str, ranks))} on {where}: {', '.join(odd[:SHOWN])}{more}"
