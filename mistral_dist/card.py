"""The README of an adapter: what it was made from, and how."""

import re

from mistral_dist.config import Recipe, Source
from mistral_dist.data.remote import shown


def model_card(recipe: Recipe, about: str, steps: int) -> str:
    """A README for the adapter: base, data, recipe; with the header that the hub reads."""
    return f"""---
base_model: {recipe.model.name}
library_name: peft
tags: {tags(recipe)}
---

# {recipe.run_dir.name}

A LoRA adapter for `{recipe.model.name}` (revision `{recipe.model.revision}`), trained by mistral-dist for {steps} steps on
{about}.

## Recipe

```yaml
{publishable(recipe).dump().rstrip()}
```
"""


def tags(recipe: Recipe) -> str:
    """By which the hub finds it."""
    return f"[lora, {'qlora, ' if recipe.model.quantization == 'nf4' else ''}mistral-dist]"


def origin(card: str) -> tuple[int, str] | None:
    """(steps, data in words) as `model_card` wrote them; None where another card stands there."""
    found = re.search(r"trained by mistral-dist for (\d+) steps on\n(.*)\.\n", card)
    return None if found is None else (int(found[1]), found[2])


def publishable(recipe: Recipe) -> Recipe:
    """The recipe without the signatures and passwords that URLs may hold."""

    def without_secrets(sources: tuple[Source, ...]) -> tuple[Source, ...]:
        return tuple(source.model_copy(update={"path": shown(source.path)}) if source.path else source for source in sources)

    hidden = {name: without_secrets(getattr(recipe.data, name)) for name in ("sources", "benchmarks")}
    return recipe.model_copy(update={"data": recipe.data.model_copy(update=hidden)})
