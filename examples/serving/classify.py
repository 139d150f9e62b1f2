"""A classifier behind vLLM: the label of a text, and how probable each label is.

    mistral-dist export runs/demo models/demo && mistral-dist serve models/demo
    python examples/serving/classify.py models/demo "Return a sorted copy of an array."

Each label is put into the conversation as the answer, and the server tells the log-probability of its tokens, the one that ends it
among them: the score that `mistral-dist evaluate` gives. Labels share the prompt, which vLLM computes once. Needs `pip install openai`.
"""

import argparse
import json
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai

Scored = list[tuple[str, float]]
"""Tokens of a conversation, each with its log-probability in nats."""


def probabilities(client: openai.OpenAI, model: str, turns: list[Any], labels: list[str]) -> dict[str, float]:
    """How probable each label is as the answer to some turns; they add up to 1."""
    with ThreadPoolExecutor(len(labels)) as pool:
        scored = list(pool.map(lambda label: _score(client, model, turns, label), labels))
    shared = next(n for n, tokens in enumerate(zip(*scored, strict=False)) if len({token for token, _ in tokens}) > 1)
    sums = [sum(value for _, value in tokens[shared:]) for tokens in scored]
    weights = [math.exp(value - max(sums)) for value in sums]
    return {label: weight / sum(weights) for label, weight in zip(labels, weights, strict=True)}


def _score(client: openai.OpenAI, model: str, turns: list[Any], label: str) -> Scored:
    more = {"add_generation_prompt": False, "prompt_logprobs": 0}
    answered = [*turns, {"role": "assistant", "content": label}]
    reply: Any = client.chat.completions.create(model=model, messages=answered, max_tokens=1, extra_body=more)
    (*entries,) = [next(iter(entry.values())) for entry in reply.prompt_logprobs[1:]]  # nothing predicts the first
    tokens = [(entry["decoded_token"], entry["logprob"]) for entry in entries]
    while not tokens[-1][0].strip():  # a template's line feed after the answer's end
        tokens.pop()
    return tokens


def question(task: dict[str, Any], text: str) -> list[Any]:
    """The turns that ask for the label of a text."""
    prompt = task["prompt"].replace("{labels}", ", ".join(task["labels"])).replace("{text}", text)
    system = [{"role": "system", "content": task["system"]}] if task["system"] else []
    return [*system, {"role": "user", "content": prompt}]


def main() -> None:
    """Print the labels of a text, the likeliest first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("export", type=Path, help="what is served: a folder that `mistral-dist export` has written")
    parser.add_argument("text")
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--key", default="none", help="what the server was started with as VLLM_API_KEY")
    asked = parser.parse_args()
    task = json.loads((asked.export / "export.json").read_text())["task"]
    client = openai.OpenAI(base_url=asked.url, api_key=asked.key)
    found = probabilities(client, asked.export.resolve().name, question(task, asked.text), task["labels"])
    for label, probability in sorted(found.items(), key=lambda item: -item[1]):
        print(f"{probability:7.1%}  {label}")


if __name__ == "__main__":
    main()
