"""A classifier behind vLLM: the label of a text, and how probable each label is.

    mistral-dist export runs/demo models/demo && mistral-dist serve models/demo
    python examples/serving/classify.py models/demo "Return a sorted copy of an array."

The server tokenizes the question; behind it stand the tokens of each label and of the answer's end, which the folder's export.json knows,
and the server tells their log-probabilities: the score that `mistral-dist evaluate` gives. Needs `pip install openai`; the key, where
there is one, is taken from VLLM_API_KEY.
"""

import argparse
import json
import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai


def probabilities(client: openai.OpenAI, model: str, turns: list[Any], answers: dict[str, list[int]]) -> dict[str, float]:
    """How probable each label is as the answer to some turns; they add up to 1. `answers`: the token ids of each label."""
    root = str(client.base_url).rstrip("/").removesuffix("/v1")
    question = {"model": model, "messages": turns, "add_generation_prompt": True}
    tokenized: Any = client.post(f"{root}/tokenize", body=question, cast_to=object)

    def score(answer: list[int]) -> float:
        more = {"prompt_logprobs": 0, "add_special_tokens": False}
        reply: Any = client.completions.create(model=model, prompt=tokenized["tokens"] + answer, max_tokens=1, extra_body=more)
        told = reply.choices[0].prompt_logprobs[-len(answer) :]
        return sum(entry[str(token)]["logprob"] for entry, token in zip(told, answer, strict=True))

    with ThreadPoolExecutor(len(answers)) as pool:
        scores = list(pool.map(score, answers.values()))
    weights = [math.exp(value - max(scores)) for value in scores]
    return {label: weight / sum(weights) for label, weight in zip(answers, weights, strict=True)}


def question(task: dict[str, Any], text: str) -> list[Any]:
    """The turns that ask for the label of a text."""
    prompt = task["prompt"].replace("{labels}", ", ".join(task["labels"])).replace("{text}", text)
    if not task["system"]:
        return [{"role": "user", "content": prompt}]
    if not task["system_turn"]:  # the chat template would refuse one, or not show it
        return [{"role": "user", "content": f"{task['system']}\n\n{prompt}"}]
    return [{"role": "system", "content": task["system"]}, {"role": "user", "content": prompt}]


def main() -> None:
    """Print the labels of a text, the likeliest first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("export", type=Path, help="what is served: a folder that `mistral-dist export` has written")
    parser.add_argument("text")
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    asked = parser.parse_args()
    task = json.loads((asked.export / "export.json").read_text())["task"]
    client = openai.OpenAI(base_url=asked.url, api_key=os.environ.get("VLLM_API_KEY", "none"))
    found = probabilities(client, asked.export.resolve().name, question(task, asked.text), task["answers"])
    for label, probability in sorted(found.items(), key=lambda item: -item[1]):
        print(f"{probability:7.1%}  {label}")


if __name__ == "__main__":
    main()
