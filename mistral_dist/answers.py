"""A model and encoded examples -> what it says of them: the likelihood of labels, the loss, an answer of its own.

Labels are scored by likelihood: for each example, the log-probability of every label (and of stopping after it) as the answer.
All labels of an example share its prompt in one row, where each label sees the prompt and itself alone; so the prompt is
computed once.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import transformers

from mistral_dist.data.encode import Candidates, Encoded
from mistral_dist.data.stream import Batch, collate

Which = Literal["base", "tuned"]
MODELS: tuple[Which, ...] = ("base", "tuned")


def as_model(model: Any, which: Which) -> Any:
    """The model as base (adapter off) or tuned."""
    return model.disable_adapter() if which == "base" else nullcontext()


@dataclass(frozen=True)
class LabelRow:
    """Classification prompts with all their labels, end to end in one row of T tokens."""

    input_ids: torch.Tensor
    """int64 [1, T]"""
    position_ids: torch.Tensor
    """int64 [1, T]: each label goes on where its prompt ends"""
    mask: torch.Tensor
    """bool [1, 1, T, T]: whether the row's token (third index) sees another (fourth)"""
    predict_from: torch.Tensor
    """int64 [N]: positions whose hidden states predict an answer's token"""
    targets: torch.Tensor
    """int64 [N]: those tokens"""
    owner: torch.Tensor
    """int64 [N]: example x labels + label that the token belongs to"""


def label_row(examples: Sequence[Candidates]) -> LabelRow:
    """Lay out prompts and answers; the last token of an answer is only predicted, so it is not in the row."""
    ids: list[int] = []
    positions: list[int] = []
    example_of_token: list[int] = []
    branch: list[int] = []  # 0 for the prompt, 1 + label for an answer
    predict_from: list[int] = []
    targets: list[int] = []
    owner: list[int] = []
    for n, example in enumerate(examples):
        end = len(ids) + len(example.prompt)
        for label, answer in enumerate([[], *example.answers]):
            fed = example.prompt if label == 0 else answer[:-1]
            if label:
                predict_from += [end - 1, *range(len(ids), len(ids) + len(fed))]
                targets += answer
                owner += [n * len(example.answers) + label - 1] * len(answer)
            start = 0 if label == 0 else len(example.prompt)
            ids += fed
            positions += range(start, start + len(fed))
            example_of_token += [n] * len(fed)
            branch += [label] * len(fed)
    of, on = torch.tensor(example_of_token), torch.tensor(branch)
    sees = (of[:, None] == of) & ((on == 0) | (on[:, None] == on)) & torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
    row = (torch.tensor(values, dtype=torch.int64) for values in ([ids], [positions], predict_from, targets, owner))
    input_ids, position_ids, where, what, whose = row
    return LabelRow(input_ids, position_ids, sees[None, None], where, what, whose)


@torch.no_grad()
def label_scores(model: Any, row: LabelRow, examples: int, labels: int, device: torch.device) -> torch.Tensor:
    """Log-probability of each label as the whole answer, in nats; float64 [examples, labels]."""
    logits = model(
        input_ids=row.input_ids.to(device),
        position_ids=row.position_ids.to(device),
        attention_mask=row.mask.to(device),
        logits_to_keep=row.predict_from.to(device),
        use_cache=False,
    ).logits[0]
    found = logits.float().log_softmax(-1).gather(1, row.targets.to(device)[:, None])[:, 0].double().cpu()
    # added on the CPU: a GPU adds in any order, so with other last bits each time
    return torch.zeros(examples * labels, dtype=torch.float64).index_add_(0, row.owner, found).view(examples, labels)


@torch.no_grad()
def losses(model: Any, examples: Sequence[Encoded], device: torch.device) -> np.ndarray:
    """Summed cross-entropy over each example's targets, in nats: float64 [examples], all in one row."""
    batch = Batch(**collate(examples), ids=()).to(device)
    output = model(input_ids=batch.input_ids, position_ids=batch.position_ids, logits_to_keep=batch.predict_from, use_cache=False)
    each = torch.nn.functional.cross_entropy(output.logits[0].float(), batch.targets, reduction="none").double().cpu().numpy()
    ends = np.cumsum([example.targets.size for example in examples])
    return np.add.reduceat(each, [0, *ends[:-1]])


@dataclass(frozen=True)
class Answer:
    """What a model has written."""

    text: str
    """Without control tokens and blanks around it."""
    ended: bool
    """Whether the model stopped by itself."""


@torch.no_grad()
def write_answers(
    model: Any, prompts: Sequence[Sequence[int]], tokenizer: Any, max_new_tokens: int, device: torch.device, streamer: Any = None
) -> list[Answer]:
    """Greedy answers to prompts of token ids, together, with the KV cache. Shorter prompts are padded on the left, and masked there."""
    longest, end = max(map(len, prompts)), tokenizer.eos_token_id
    ids = torch.tensor([[end] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    greedy = transformers.GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=end, pad_token_id=end, use_cache=True
    )
    written = model.generate(input_ids=ids, attention_mask=mask, generation_config=greedy, streamer=streamer)[:, longest:].tolist()
    return [_answer(row, tokenizer) for row in written]


def _answer(ids: list[int], tokenizer: Any) -> Answer:
    ended = tokenizer.eos_token_id in ids
    kept = ids[: ids.index(tokenizer.eos_token_id)] if ended else ids
    return Answer(tokenizer.decode(kept, skip_special_tokens=True).strip(), ended)
