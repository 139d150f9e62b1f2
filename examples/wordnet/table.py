"""The table of docs/wordnet.md, by one command: train, evaluate, look at what went worst, train on, and see whether that helped.

    apt install wordnet-base
    python -m examples.wordnet.table docs/wordnet.md

6,000 definitions drawn from WordNet's 82,000, a 135M model, one epoch each. Then the topics with the lowest F1
get more definitions of their own, the second run begins with the first one's adapter, and both are compared on the same test examples.
"""

import argparse
import hashlib
import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from examples.wordnet.collect import NOUNS, rows
from mistral_dist.demo import make_model
from mistral_dist.report.compare import Difference, difference
from mistral_dist.report.facts import Facts
from mistral_dist.run import RunDirectory

RECIPE = Path(__file__).with_name("wordnet.yaml")
FIRST, MORE = 6000, 3000
"""Rows of the first run; rows that the second one gets besides."""
WEAKEST = 6
"""Topics that get them."""
FEW = 10
"""A topic with fewer test examples is not judged by them."""
MEASURES = ("accuracy", "precision_macro", "recall_macro", "f1_macro", "f1_weighted")
Row = dict[str, str]


def drawn(found: Iterable[Row]) -> list[Row]:
    """In an order that depends on each row alone."""
    return sorted(found, key=lambda row: hashlib.sha256(json.dumps(row).encode()).digest())


def write(file: Path, kept: Sequence[Row]) -> Path:
    """As JSON Lines."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))
    return file


def trained(run: Path, *overrides: str) -> Facts:
    """A run of the recipe, trained and evaluated; what is there already is not done again."""
    for words in (["train", str(RECIPE), f"run.dir={run}", *overrides], ["evaluate", str(run)]):
        if words[0] == "train" or not (run / "evaluation" / "test.json").is_file():
            subprocess.run([sys.executable, "-m", "mistral_dist.cli", *words], check=True)
    return Facts(RunDirectory(run))


def weakest(test: dict[str, Any]) -> list[str]:
    """The topics with the lowest F1 among those with enough test examples."""
    judged = {topic: row["f1"] for topic, row in test["tuned"]["per_class"].items() if row["support"] >= FEW}
    return sorted(judged, key=judged.__getitem__)[:WEAKEST]


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """In Markdown."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines))


def interval(found: dict[str, float]) -> str:
    """A value with its 95 % interval."""
    return f"{found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"


def page(first: Facts, second: Facts, topics: Sequence[str], more: int) -> str:
    """docs/wordnet.md."""
    assert first.test is not None and second.test is not None
    answers = {"base": first.test["base"], "first run": first.test["tuned"], "second run": second.test["tuned"]}
    measures = [(name, *(interval(found[name]) for found in answers.values())) for name in MEASURES]
    rows_of_topics = [
        (
            topic,
            str(row["support"]),
            *(f"{found['per_class'][topic]['f1']:.2f}" for found in answers.values()),
            "x" if topic in topics else "",
        )
        for topic, row in sorted(first.test["tuned"]["per_class"].items(), key=lambda item: item[1]["f1"])
    ]
    worst = [(line["label"], line["tuned"], f"{line['probability']:.2f}", line["text"]) for line in first.evaluation("worst")[:8]]
    told = difference(first, second)
    assert isinstance(told, Difference), told
    gained = interval(told.interval)
    verdict = f"{gained} in accuracy, McNemar p = {told.p_value:.3g}: {'real' if told.is_real else 'not to be told from chance'}"
    return f"""# WordNet: which topic is this definition of?

Made by `python -m examples.wordnet.table docs/wordnet.md`: {FIRST:,} of WordNet's 82,000 noun definitions, 26 topics, the demo's
model of 135M parameters, one epoch of QLoRA. {first.test["n"]:,} held-out test examples; in brackets 95 % intervals over test examples.

{table(("", *answers), measures)}

## What went worst, and what was done

The mistakes that the first run was most sure of:

{table(("topic", "said", "how sure", "definition"), worst)}

The second run begins with the first one's adapter (`model.adapter`) and trains on {more:,} more definitions of the {WEAKEST} topics with
the lowest F1 that have {FEW} test examples or more ({", ".join(topics)}), beside the first ones. On the same test examples it
gained {verdict}.

## By topic

F1, the lowest of the first run on top:

{table(("topic", "test examples", *answers, "more rows"), rows_of_topics)}
"""


def main() -> None:
    """Train twice and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("--nouns", type=Path, default=NOUNS)
    parser.add_argument("--folder", type=Path, default=Path("runs/wordnet"), help="for rows, data and runs")
    asked = parser.parse_args()
    make_model()
    found, folder = drawn(rows(asked.nouns)), asked.folder
    begin = f"{{path: {write(folder / 'first.jsonl', found[:FIRST])}}}"
    first = trained(folder / "first", f"data.sources=[{begin}]", f"data.dir={folder}/data-first")
    assert first.test is not None
    topics = weakest(first.test)
    more = [row for row in found[FIRST:] if row["label"] in topics][:MORE]
    added = f"{{path: {write(folder / 'second.jsonl', more)}, into: train}}"
    words = [
        f"data.sources=[{begin}, {added}]",
        f"data.dir={folder}/data-second",
        f"model.adapter={folder}/first",
        "optim.learning_rate=1e-3",
    ]
    second = trained(folder / "second", *words)
    asked.page.write_text(page(first, second, topics, len(more)))


if __name__ == "__main__":
    main()
