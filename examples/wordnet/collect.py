"""WordNet's noun glosses with their topics, as JSON Lines: 82,000 short definitions in 26 classes.

    apt install wordnet-base
    python examples/wordnet/collect.py data/raw/wordnet.jsonl

A line of WordNet's `data.noun` is `offset topic type words ... | gloss` (wndb(5WN)); the topic is the number of the
lexicographer's file that the word was written in (lexnames(5WN)).
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

NOUNS = Path("/usr/share/wordnet/data.noun")
TOPICS = (  # noqa: SIM905 - words in a line are easier to read
    "tops act animal artifact attribute body cognition communication event feeling food group location motive object person "
    "phenomenon plant possession process quantity relation shape state substance time"
).split()
FIRST = 3
"""The number of the first noun file, noun.Tops."""


def rows(nouns: Path) -> Iterator[dict[str, str]]:
    """One row for each synset: its gloss, its topic, its first word."""
    with open(nouns, encoding="utf-8") as lines:
        for line in lines:
            if line.startswith("  "):
                continue  # the licence
            fields, _, gloss = line.partition(" | ")
            _, topic, _, _, word, *_ = fields.split()
            yield {"text": gloss.strip(), "label": TOPICS[int(topic) - FIRST], "word": word.replace("_", " ")}


def main() -> None:
    """Write the rows into a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--nouns", type=Path, default=NOUNS)
    choice = parser.parse_args()
    choice.file.parent.mkdir(parents=True, exist_ok=True)
    with open(choice.file, "w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows(choice.nouns))


if __name__ == "__main__":
    main()
