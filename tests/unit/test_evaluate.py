"""What an evaluation refuses to say: of data that may have been trained on, and of a model that gives no numbers."""

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from mistral_dist.base_cache import fingerprint
from mistral_dist.config import Recipe
from mistral_dist.data.example import Example
from mistral_dist.errors import RunError, TrainingError
from mistral_dist.evaluate import held_out, refuse_another_base
from mistral_dist.exams.exam import document_of, refuse_nonfinite
from mistral_dist.hub import local_path
from mistral_dist.predict import _line
from mistral_dist.run import RunDirectory
from mistral_dist.workflow import prepare_if_needed
from tests.conftest import LABELS, WriteRecipe

RECORDS: Sequence[Mapping[str, Any]] = [{"place": "rows.jsonl:1"}, {"place": "rows.jsonl:2"}]


def test_data_prepared_anew_are_refused_also_where_no_checkpoint_is_left(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    """What is held out now may have been trained on; where nothing tells what was, either."""
    recipe, run = Recipe.load(write_recipe()), RunDirectory(tmp_path / "run")
    prepared = prepare_if_needed(recipe)
    run.path.mkdir()
    for known, is_taken in ((prepared.fingerprint, True), ("another", False), (None, False)):
        (run.path / "status.json").write_text(json.dumps({"state": "finished", **({"held_out": known} if known else {})}))
        if is_taken:
            assert len(held_out(recipe, run)[0]) == prepared.manifest["examples"]["test"]
        else:
            with pytest.raises(RunError, match="was trained on other data"):
                held_out(recipe, run)


def test_another_base_is_refused(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    """By the content of its files: one of the same name and shape at model.path, or fetched again after it has changed."""
    recipe, run = Recipe.load(write_recipe()), RunDirectory(tmp_path / "run")
    base = fingerprint(recipe.model)
    run.path.mkdir()
    other = tmp_path / "other"
    shutil.copytree(local_path(recipe.model), other)
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    moved = recipe.model.model_copy(update={"path": str(other)})
    (run.path / "status.json").write_text(json.dumps({"state": "finished", "base": base}))
    refuse_another_base(recipe.model, run)
    with pytest.raises(RunError, match=rf"other files of the base test/small than those in {other}: fingerprint {base} then"):
        refuse_another_base(moved, run)
    (run.path / "status.json").write_text(json.dumps({"state": "finished"}))  # nothing tells
    refuse_another_base(moved, run)


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_a_model_that_gives_no_number_is_told_and_not_scored(bad: float) -> None:
    refuse_nonfinite({"base": {0: [-1.0, -2.0], 1: [-3.0, -4.0]}, "tuned": {0: 1.5, 1: 2.5}}, RECORDS)
    for answers in ({0: [-1.0, -2.0], 1: [-3.0, bad]}, {0: 1.5, 1: bad}):
        with pytest.raises(TrainingError, match=r"tuned model gives no finite likelihood for 1 of 2 .* from rows\.jsonl:2"):
            refuse_nonfinite({"base": {0: 0.0, 1: 0.0}, "tuned": answers}, RECORDS)


def test_a_row_without_a_finite_likelihood_is_answered_with_an_error(write_recipe: WriteRecipe) -> None:
    recipe, row = Recipe.load(write_recipe()), Example("rows.jsonl:7", "a text")
    line = _line(row, [-1.0] * (len(LABELS) - 1) + [math.nan], recipe)
    assert line == {"place": "rows.jsonl:7", "text": "a text", "error": "rows.jsonl:7: the model gives no finite likelihood"}
    assert _line(row, [-9.0] * (len(LABELS) - 1) + [-1.0], recipe)["label"] == LABELS[-1]


def test_pieces_know_their_document() -> None:
    assert document_of("00ff00ff00ff00ff") == document_of("00ff00ff00ff00ff-12") == "00ff00ff00ff00ff"
