"""What a model says of examples: the same in company as alone, and as plain transformers says it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from mistral_dist.answers import label_row, label_scores, losses, write_answers
from mistral_dist.config import Recipe
from mistral_dist.data.encode import Candidates, Encoded
from mistral_dist.data.stream import Batch, collate
from mistral_dist.hub import load_tokenizer
from mistral_dist.loss import summed_loss
from mistral_dist.model import build_trainable, frozen_base

CPU = torch.device("cpu")


@pytest.fixture
def recipe(write_recipe: Callable[..., Path]) -> Recipe:
    return Recipe.load(write_recipe())


@pytest.fixture
def model(recipe: Recipe) -> Any:
    return build_trainable(recipe, CPU, "sdpa").eval()


def batch_of(*examples: Encoded) -> Batch:
    return Batch(**collate(examples), ids=())


def encoded(length: int, targets: int, seed: int) -> Encoded:
    ids = torch.randint(100, 40_000, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return Encoded(ids, list(range(length - targets, length)))


def test_labels_scored_in_one_row_as_each_alone(model: Any) -> None:
    examples = [
        Candidates(encoded(12, 1, 1).ids.tolist(), [[11, 2], [12, 13, 2], [14, 15, 16, 2]]),
        Candidates(encoded(7, 1, 2).ids.tolist(), [[21, 2], [22, 23, 2], [2]]),
    ]
    scores = label_scores(model, label_row(examples), 2, 3, CPU)
    for n, example in enumerate(examples):
        for label, answer in enumerate(example.answers):
            ids = example.prompt + answer
            with torch.no_grad():
                alone = -summed_loss(model, batch_of(Encoded(ids, list(range(len(example.prompt), len(ids))))))
            assert float(scores[n, label]) == pytest.approx(float(alone), rel=1e-5, abs=1e-5)


def test_a_bfloat16_model_asked_in_float32_says_the_same_in_any_company(write_recipe: Callable[..., Path]) -> None:
    examples = [Candidates(encoded(length, 1, length).ids.tolist(), [[21, 2], [22, 23, 2], [24, 25, 26, 2]]) for length in (90, 37, 61)]

    def apart(dtype: str) -> float:
        recipe = Recipe.load(write_recipe(), ["model.dtype=bfloat16", f"evaluate.dtype={dtype}"])
        model = frozen_base(recipe.asked_model, CPU, "sdpa").eval()
        together = label_scores(model, label_row(examples), 3, 3, CPU)
        alone = torch.cat([label_scores(model, label_row([example]), 1, 3, CPU) for example in examples])
        return float((together - alone).abs().max())

    assert apart("float32") <= 1e-4
    assert apart("auto") > 1e-3, "as in training"


def test_losses_are_each_examples_own(model: Any) -> None:
    examples = [encoded(23, 5, 1), encoded(41, 1, 2), encoded(9, 8, 3)]
    found = losses(model, examples, CPU)
    assert found.dtype == np.float64
    with torch.no_grad():
        alone = [float(summed_loss(model, batch_of(example))) for example in examples]
    np.testing.assert_allclose(found, alone, rtol=1e-5)
    assert losses(model, examples[1:2], CPU) == pytest.approx(found[1:2], rel=1e-5)


def test_answers_are_those_of_plain_transformers_one_by_one(recipe: Recipe) -> None:
    """Prompts of other lengths beside them are padded and masked. Where one stops, the others go on."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    model: Any = transformers.MistralForCausalLM(transformers.MistralConfig(vocab_size=500, initializer_range=0.3, **sizes)).eval()
    tokenizer = load_tokenizer(recipe.model)
    prompts = [torch.randint(100, 500, (length,)).tolist() for length in (30, 7, 19)]
    config = transformers.GenerationConfig(do_sample=False, max_new_tokens=12, eos_token_id=None, pad_token_id=0)
    plain = [model.generate(input_ids=torch.tensor([ids]), generation_config=config)[0, len(ids) :].tolist() for ids in prompts]
    # as if one of them had ended in the middle: with a token that stands nowhere else
    others = {one: {id for n, ids in enumerate(plain) if n != one for id in ids} for one in range(3)}
    ending, end = next(
        (n, k) for n, ids in enumerate(plain) for k, id in enumerate(ids) if k > 2 and id not in others[n] and id not in ids[:k]
    )
    tokenizer.eos_token_id = plain[ending][end]
    found = write_answers(model, prompts, tokenizer, 12, CPU)
    plain[ending] = plain[ending][:end]
    assert [answer.ended for answer in found] == [n == ending for n in range(3)]
    assert [answer.text for answer in found] == [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in plain]
    assert len({answer.text for answer in found}) == 3
