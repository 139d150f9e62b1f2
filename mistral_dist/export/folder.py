"""What lies beside the weights in an exported folder: all that an engine needs to ask the model as it was taught."""

import json
import re
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import transformers

from mistral_dist.base_cache import dtype_name
from mistral_dist.card import publishable, tags
from mistral_dist.config import Model, Recipe
from mistral_dist.data.encode import Encoder
from mistral_dist.export.forms import FACTS, MEANS, SUMS, Form
from mistral_dist.export.likeness import Likeness
from mistral_dist.files import sha256, write_text
from mistral_dist.hub import local_path
from mistral_dist.resampling import is_interval

MEASURES = ("accuracy", "f1_macro", "loss", "exact_match", "rouge_l", "bleu", "chrf", "stop_rate")
"""Of the evaluation, those that stand on the card."""
MODEL = ("name", "revision", "path", "dtype", "quantization", "trust_remote_code")
"""Of the recipe's `model`, what export.json says: how the base is found and loaded."""
Likenesses = dict[Form, Likeness]


def write_settings(recipe: Recipe, encoder: Encoder, form: Form, folder: Path) -> None:
    """Tokenizer, chat template, generation settings with the token that ends an answer, and of a merged model its configuration."""
    tokenizer, base = encoder.tokenizer, local_path(recipe.model)
    tokenizer.save_pretrained(str(folder))
    if encoder.mistral_file is not None:
        shutil.copyfile(encoder.mistral_file, folder / encoder.mistral_file.name)
    if form is Form.ADAPTER:
        return
    config = transformers.AutoConfig.from_pretrained(base, trust_remote_code=recipe.model.trust_remote_code)
    config.dtype = dtype_name(recipe.model)
    config.save_pretrained(folder)
    end = tokenizer.eos_token_id
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end
    transformers.GenerationConfig(bos_token_id=tokenizer.bos_token_id, eos_token_id=end, pad_token_id=pad).save_pretrained(folder)


def write_card(recipe: Recipe, form: Form, likenesses: Likenesses, facts: dict[str, Any], folder: Path) -> None:
    """README.md, and export.json with the same figures for programs.

    `facts`: `name`; `origin` (steps and data, in words); `licence` (of the base, or None); `model` (MODEL, as exported); `base` (its
    fingerprint); `mistral_file`; `tools` (whether that tokenizer has them); `test` (what evaluation/test.json says, or None); `examples`
    (how many were compared); `asking` (how a client asks: `system_turn`, `begins_with`, and of a classifier `answers`, each label's
    token ids with the one that ends it).
    """
    figures = {str(one): asdict(likeness) for one, likeness in likenesses.items()}
    task = recipe.task.model_dump(mode="json", include={"kind", "labels", "prompt", "system"})
    about = {"form": form, "task": {**task, **facts["asking"]}, **{key: facts[key] for key in ("model", "base", "mistral_file", "tools")}}
    write_text(folder / FACTS, json.dumps({**about, "compared": figures, "examples": facts["examples"]}, indent=2) + "\n")
    write_text(folder / "README.md", _card(recipe, form, likenesses, facts))


def write_sums(folder: Path) -> None:
    """The SHA-256 of every file, the last thing that is written."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    write_text(folder / SUMS, "".join(f"{sha256(file)}  {file.relative_to(folder)}\n" for file in files))


def rows(likenesses: Likenesses) -> list[tuple[str, ...]]:
    """A table: its head, then a row for each form; empty where nothing was measured."""
    measured = list(likenesses.items())
    if not measured:
        return []
    classifies = any(likeness.accuracy is not None for _, likeness in measured)
    head = ("form", "KL", "largest KL", "loss", "same next token", "same answer", *(("accuracy",) if classifies else ()))
    live = measured[0][1]
    lines = [("live adapter", "", "", f"{live.live_loss:.4f}", "", "", *((f"{live.live_accuracy:.3f}",) if classifies else ()))]
    for form, found in measured:
        figures = (f"{found.kl:.2e}", f"{found.max_kl:.2e}", f"{found.loss:.4f}", f"{found.same_token:.1%}", f"{found.same_answer:.1%}")
        lines.append((str(form), *figures, *((f"{found.accuracy:.3f}",) if classifies else ())))
    return [head, *lines]


def _card(recipe: Recipe, form: Form, likenesses: Likenesses, facts: dict[str, Any]) -> str:
    library = "peft" if form is Form.ADAPTER else "transformers"
    licence = facts["licence"]
    terms = f"`{licence}`" if licence else "see the base's page"
    return f"""---
base_model: {recipe.model.name}
library_name: {library}
pipeline_tag: text-generation
{f"license: {licence}{chr(10)}" if licence else ""}tags: {tags(recipe)}
---

# {facts["name"]}

`{recipe.model.name}` (revision `{recipe.model.revision}`), fine-tuned by mistral-dist{facts["origin"]}.
The licence of the base ({terms}) holds for this model, too.

This folder: **{form}**, {MEANS[form]}.
{_compared(recipe, likenesses, facts["examples"])}{_measured(facts["test"])}
## How to ask it

{_how_to_ask(recipe, facts["asking"], facts["mistral_file"])}

## Recipe

```yaml
{publishable(recipe).dump().rstrip()}
```

`sha256sum --check {SUMS}` looks whether all files are as they were written.
"""


def _mistral_mode(file: str) -> str:
    """What a server must be told, where training has used Mistral's own library."""
    return f"""Its conversations were encoded by mistral-common with `{file}`, which is in this folder: serve it with that, in vLLM by
`--tokenizer-mode mistral`. The chat template of the Hugging Face tokenizer may give other tokens."""


def _compared(recipe: Recipe, likenesses: Likenesses, examples: int) -> str:
    if not likenesses:
        return "\nIt was not compared with the live adapter.\n"
    live = "4-bit base" if recipe.model.quantization == "nf4" else "base"
    head, *lines = rows(likenesses)
    table = [head, tuple("---" for _ in head), *lines]
    written = "\n".join(f"| {' | '.join(row)} |" for row in table)
    return f"""
## Is it the model that was trained?

The live adapter ({live} with the adapter on it) and each form, on {examples} validation examples.
KL: the mean divergence of the next-token distribution at a target, in nats.

{written}
"""


def _measured(test: dict[str, Any] | None) -> str:
    if test is None:
        return ""
    base, tuned = ({**test[which], **test[which].get("written", {})} for which in ("base", "tuned"))
    names = [name for name in MEASURES if is_interval(base.get(name)) and is_interval(tuned.get(name))]
    lines = [f"| {name} | {_interval(base[name])} | {_interval(tuned[name])} |" for name in names]
    return f"""
## Measured

On {test["n"]:,} held-out test examples with the live adapter, with 95 % intervals:

| | base | tuned |
|---|---|---|
{chr(10).join(lines)}
"""


def _interval(found: dict[str, float]) -> str:
    return f"{found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"


def _how_to_ask(recipe: Recipe, asking: dict[str, Any], mistral_file: str | None) -> str:
    task = recipe.task
    if task.kind == "pretrain":
        begin = f", behind `{asking['begins_with']}`, which its tokenizer does not put there by itself" if asking["begins_with"] else ""
        return f"It goes on with a text, as it is, without turns{begin}."
    parts = []
    if task.system:
        where = "Begin with this system turn:" if asking["system_turn"] else "Begin the first user turn with this and a blank line:"
        parts.append(f"{where}\n\n{_fenced(task.system)}")
    if task.kind == "classification":
        prompt = task.prompt.replace("{labels}", ", ".join(task.labels))
        parts.append(f"The user's turn is this, with the text in its place; the answer is one of the labels:\n\n{_fenced(prompt)}")
    if mistral_file:
        parts.append(_mistral_mode(mistral_file))
    return "\n\n".join(parts) or "By the chat template of its tokenizer."


def _fenced(text: str) -> str:
    """As it is, between fences that are longer than any in it."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}\n{text}\n{fence}"


def licence(model: Model) -> str | None:
    """Of a base, as its own README says it; those of Mistral-7B are Apache-2.0."""
    if model.name.startswith("mistralai/Mistral-7B-"):
        return "apache-2.0"
    readme = local_path(model) / "README.md"
    if not readme.is_file():
        return None
    lines = readme.read_text(encoding="utf-8", errors="replace").splitlines()
    found = next((line for line in lines[:60] if line.startswith("license:")), "")
    return found.removeprefix("license:").strip() or None
