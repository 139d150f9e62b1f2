"""How fast examples become packs, beside the bare tokenizer on the very same texts.

    python benchmarks/encode.py [--repeats 9]

Single-turn conversations, one thread, one process, its own CPU time. Each figure is the median of repeats that take turns,
so that what else the machine does falls on all alike. `ratio` is the time of the bare tokenizer divided by ours: 1 would be
free.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from mistral_dist.config import Task
from mistral_dist.data.chat_format import ChatFormat
from mistral_dist.data.encode import Encoded, Encoder
from mistral_dist.data.example import BadRow, Example
from mistral_dist.data.mistral_format import MistralFormat
from mistral_dist.data.pack import best_fit
from mistral_dist.data.stream import collate
from mistral_dist.demo import make_model

CAPACITY = 2048
"""Tokens in a pack."""
BATCH = 256
"""Examples encoded at once."""
BARS = {1000: 0.85, 60: 0.50}
"""The ratios that the template's way must reach, by mean tokens."""


def main() -> None:
    """Print the table; fail where a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    repeats = parser.parse_args().repeats
    print(f"{'format':<12}{'tokens':>8}{'bare us':>10}{'ours us':>10}{'encode us':>11}{'ratio':>8}{'bar':>7}")
    missed = False
    for name, encoder, bare in _ways():
        for tokens, count in ((60, 1024), (1000, 128)):
            examples, mean = _examples(encoder, tokens, count)
            texts = [_bare_texts(encoder, name, example) for example in examples]
            ways: list[Callable[[], Any]] = [
                partial(_packs, encoder, examples),
                partial(encoder.encode_batch, examples),
                partial(bare, texts),
            ]
            ours, alone, baseline = _medians(ways, repeats)
            ratio, bar = baseline / ours, BARS[tokens] if name == "template" else None
            missed |= bar is not None and ratio < bar
            per = 1e6 / count
            shown = f"{bar:>7.2f}" if bar is not None else f"{'-':>7}"
            print(f"{name:<12}{mean:>8.0f}{baseline * per:>10.1f}{ours * per:>10.1f}{alone * per:>11.1f}{ratio:>8.2f}{shown}", flush=True)
    if missed:
        raise SystemExit("a bar was missed")


def _ways() -> list[tuple[str, Encoder, Callable[[list[str]], Any]]]:
    """(name, encoder, the bare tokenizer) of each format."""
    import mistral_common.tokens.tokenizers.mistral as library
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(make_model(), mistral_format=False)
    backend = tokenizer.backend_tokenizer
    ways: list[tuple[str, Encoder, Callable[[list[str]], Any]]] = [
        ("template", Encoder(tokenizer, Task(kind="chat")), lambda texts: backend.encode_batch(texts, add_special_tokens=False))
    ]
    for name, made in (("mistral v1", library.MistralTokenizer.v1()), ("mistral v3", library.MistralTokenizer.v3())):
        chat_format: ChatFormat = MistralFormat(made.instruct_tokenizer.tokenizer.file_path)
        sentencepiece: Any = made.instruct_tokenizer.tokenizer  # which keeps the bare model to itself
        ways.append((name, Encoder(tokenizer, Task(kind="chat"), chat_format), sentencepiece._model.encode))
    return ways


def _examples(encoder: Encoder, tokens: int, count: int) -> tuple[list[Example], float]:
    """Conversations of about so many tokens in the mean, from half to one and a half times as long; and their true mean."""
    words = (__doc__ or "").split()
    words += [word for one in (Encoder, collate, best_fit, make_model) for word in (one.__doc__ or "").split()]
    draw = random.Random(0)
    scale, mean = 0.7, 0.0
    examples: list[Example] = []
    for _ in range(3):  # how many tokens a word has is found by trying
        draw.seed(0)
        examples = []
        for n in range(count):
            length = max(4, int(draw.uniform(0.5, 1.5) * tokens * scale))
            text = draw.choices(words, k=length)
            asked, answered = " ".join(text[: length // 2]), " ".join(text[length // 2 :])
            turns = ({"role": "user", "content": asked}, {"role": "assistant", "content": answered})
            examples.append(Example(f"f:{n}", messages=turns))
        mean = float(np.mean([len(one.ids) for one in _good(encoder.encode_batch(examples))]))
        scale *= tokens / mean
    return examples, mean


def _bare_texts(encoder: Encoder, name: str, example: Example) -> str:
    """The text that the bare tokenizer gets: the whole render."""
    turns = encoder.conversation(example)
    if name == "template":
        return str(encoder.tokenizer.apply_chat_template(turns, tokenize=False))
    return f"[INST] {turns[0]['content']} [/INST] {turns[1]['content']}"


def _packs(encoder: Encoder, examples: Sequence[Example]) -> list[dict[str, Any]]:
    """What training does with examples: encoded in batches, packed, laid end to end."""
    encoded: list[Encoded] = []
    for start in range(0, len(examples), BATCH):
        encoded += _good(encoder.encode_batch(examples[start : start + BATCH]))
    packs = best_fit([len(one.ids) for one in encoded], CAPACITY)
    return [collate([encoded[n] for n in pack]) for pack in packs]


def _good(found: Sequence[Encoded | BadRow]) -> list[Encoded]:
    assert not any(isinstance(one, BadRow) for one in found), found
    return [one for one in found if isinstance(one, Encoded)]


def _medians(ways: Sequence[Callable[[], Any]], repeats: int) -> list[float]:
    """Seconds of each, taking turns."""
    seconds: list[list[float]] = [[] for _ in ways]
    for repeat in range(repeats + 1):
        for taken, way in zip(seconds, ways, strict=True):
            start = time.process_time()
            way()
            if repeat:  # the first warms up
                taken.append(time.process_time() - start)
    return [statistics.median(taken) for taken in seconds]


if __name__ == "__main__":
    main()
