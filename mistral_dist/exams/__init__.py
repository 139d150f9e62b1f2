"""What held-out examples are asked, and what the answers of base and tuned are worth: one file for each kind of question.

exam         what all have in common
sitting      every row answered by some rank, and kept
labels       classification: how likely is each label; or which one is written
losses       how likely is the reference; loss and perplexity
written      what is written instead of the reference
"""

from mistral_dist.config import Recipe
from mistral_dist.data.encode import Encoder
from mistral_dist.exams.exam import Exam, Records
from mistral_dist.exams.labels import Labels, WrittenLabels
from mistral_dist.exams.losses import Losses
from mistral_dist.exams.written import Written
from mistral_dist.runtime.engine import Runtime


def exams_of(recipe: Recipe, runtime: Runtime, encoder: Encoder, records: Records) -> list[Exam]:
    """What a task is examined by, in this order."""
    if recipe.task.kind == "classification":
        kind: type[Labels | WrittenLabels] = Labels if recipe.evaluate.method == "likelihood" else WrittenLabels
        return [kind(recipe, runtime, encoder, records)]
    found: list[Exam] = [Losses(recipe, runtime, encoder, records)]
    if recipe.task.kind != "pretrain" and recipe.evaluate.answers:
        found.append(Written(recipe, runtime, encoder, records))
    return found
