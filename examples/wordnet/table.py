"""The table of docs/wordnet.md, by one command: train, evaluate, look at what went worst, train on, and see whether that helped.

    apt install wordnet-base
    python -m examples.wordnet.table docs/wordnet.md

1,600 definitions drawn from WordNet's 82,000, a 135M model, one epoch. The first run answers 500 others, on which the topics with the
lowest F1 are found: the test examples are there to judge, not to choose by. Two runs then begin with the first one's adapter, and train
another epoch on the same rows and 800 more: of those topics in the one, of any topic in the control. All are compared on the same test
examples. An hour on 2 cores, 95 minutes on busy ones; cut short, it goes on where it was.
"""

import argparse
import hashlib
import json
import operator
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from examples.wordnet.collect import NOUNS, rows
from mistral_dist.demo import make_model
from mistral_dist.metrics import confusion_matrix, per_class
from mistral_dist.report.compare import Difference, difference
from mistral_dist.report.facts import Facts
from mistral_dist.run import RunDirectory

RECIPE = Path(__file__).with_name("wordnet.yaml")
FIRST, TEST, LOOK, MORE = 1600, 240, 500, 800
"""Rows of the first run, of which a tenth is held out for the test; rows for the test alone; rows that the run is looked at with; rows
that the runs after it get besides."""
WEAKEST = 6
"""Topics that get them."""
FEW = 10
"""A topic with fewer definitions to look at is not judged by them."""
MEASURES = ("accuracy", "precision_macro", "recall_macro", "f1_macro", "f1_weighted")
Row = dict[str, Any]


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


def answered(run: Path, file: Path) -> list[Row]:
    """What a run says of rows that it was not trained on: the rows with `said` and `sure`, its label and the probability of it."""
    out = file.with_name(f"{run.name}-{file.name}")
    if not out.is_file():
        subprocess.run([sys.executable, "-m", "mistral_dist.cli", "predict", str(run), str(file), "--out", str(out)], check=True)
    rows, answers = ([json.loads(line) for line in path.read_text().splitlines()] for path in (file, out))
    return [
        {**row, "said": answer["label"], "sure": answer["probabilities"][answer["label"]]}
        for row, answer in zip(rows, answers, strict=True)
    ]


def weakest(looked: Sequence[Row]) -> list[str]:
    """The topics with the lowest F1 among those with enough definitions."""
    topics = sorted({row["label"] for row in looked} | {row["said"] for row in looked})
    confusion = confusion_matrix(*([topics.index(row[column]) for row in looked] for column in ("label", "said")), len(topics))
    found = zip(topics, confusion.sum(1), per_class(confusion)["f1"], strict=True)
    judged = {topic: f1 for topic, support, f1 in found if support >= FEW}
    return sorted(judged, key=judged.__getitem__)[:WEAKEST]


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """In Markdown."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines))


def interval(found: dict[str, float]) -> str:
    """A value with its 95 % interval."""
    return f"{found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"


def gained(before: Facts, after: Facts) -> str:
    """By how much a run is better than another, or worse, in words."""
    found = difference(before, after)
    assert isinstance(found, Difference), found
    return f"{found.verdict}, {interval(found.interval)} in accuracy (McNemar's exact test: p = {found.p_value:.2g})"


def page(first: Facts, control: Facts, second: Facts, looked: Sequence[Row], topics: Sequence[str]) -> str:
    """docs/wordnet.md."""
    assert first.test is not None and control.test is not None and second.test is not None
    answers = {
        "base": first.test["base"],
        "first run": first.test["tuned"],
        "control": control.test["tuned"],
        "weakest topics": second.test["tuned"],
    }
    measures = [(name, *(interval(found[name]) for found in answers.values())) for name in MEASURES]
    rows_of_topics = [
        (topic, str(row["support"]), *(f"{found['per_class'][topic]['f1']:.2f}" for found in answers.values()), "x" * (topic in topics))
        for topic, row in sorted(first.test["tuned"]["per_class"].items(), key=lambda item: item[1]["f1"])
    ]
    wrong = sorted((row for row in looked if row["said"] != row["label"]), key=operator.itemgetter("sure"), reverse=True)
    worst = [(row["label"], row["said"], f"{row['sure']:.2f}", row["text"]) for row in wrong[:8]]
    return f"""# WordNet: which topic is this definition of?

Made by `python -m examples.wordnet.table docs/wordnet.md`: {FIRST + TEST:,} of WordNet's 82,000 noun definitions, 26 topics, the demo's
model of 135M parameters, one epoch of QLoRA. {first.test["n"]:,} held-out test examples; in brackets 95 % intervals over test examples.

{table(("", *answers), measures)}

## What went worst, and what was done

The first run was asked about {len(looked):,} definitions that are in none of its splits, and got {len(wrong):,} wrong. Of these it was most
sure of:

{table(("topic", "said", "how sure", "definition"), worst)}

The {WEAKEST} topics with the lowest F1 there ({", ".join(topics)}) get {MORE:,} more definitions.
That run begins with the first one's adapter (`model.adapter`) and trains another epoch on the first rows and the new ones. An epoch
more helps by itself, and so do more rows; the control does the same with {MORE:,} new definitions of any topic. On the same test examples,

- the control against the first run: {gained(first, control)};
- the weakest topics' run against the first run: {gained(first, second)};
- the weakest topics' run against the control, which is what choosing the topics was worth: {gained(control, second)}.

## By topic

F1 on the test examples, the lowest of the first run on top; x: got more definitions in the last run.

{table(("topic", "test examples", *answers, ""), rows_of_topics)}
"""


def main() -> None:
    """Train three times and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("--nouns", type=Path, default=NOUNS)
    parser.add_argument("--folder", type=Path, default=Path("runs/wordnet"), help="for rows, data and runs")
    asked = parser.parse_args()
    make_model()
    found, folder = drawn(rows(asked.nouns)), asked.folder
    begin, test = write(folder / "first.jsonl", found[:FIRST]), write(folder / "test.jsonl", found[FIRST : FIRST + TEST])
    rest = found[FIRST + TEST :]
    sources = f"{{path: {begin}}}, {{path: {test}, into: test}}"
    first = trained(folder / "first", f"data.sources=[{sources}]", f"data.dir={folder}/data-first")
    looked = answered(folder / "first", write(folder / "look.jsonl", rest[:LOOK]))
    topics, rest = weakest(looked), rest[LOOK:]

    def second(name: str, more: Sequence[Row]) -> Facts:
        added = f"{{path: {write(folder / f'{name}.jsonl', more)}, into: train}}"
        words = [f"data.sources=[{sources}, {added}]", f"data.dir={folder}/data-{name}", f"model.adapter={folder}/first"]
        return trained(folder / name, *words, "optim.learning_rate=1e-3")

    control = second("control", rest[:MORE])
    chosen = second("weakest", [row for row in rest if row["label"] in topics][:MORE])
    asked.page.write_text(page(first, control, chosen, looked, topics))


if __name__ == "__main__":
    main()
