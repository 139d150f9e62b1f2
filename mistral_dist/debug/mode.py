"""What `mistral-dist train RECIPE --debug` does: the recipe cut short, two launches, the report."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mistral_dist.config import Recipe
from mistral_dist.debug import FILE
from mistral_dist.debug.findings import Finding, resumed
from mistral_dist.display import say
from mistral_dist.errors import FINISHED, RunError, TrainingError
from mistral_dist.files import remove, write_text
from mistral_dist.run import check_free
from mistral_dist.runtime import launcher
from mistral_dist.topology import Topology
from mistral_dist.workflow import prepare_if_needed, start_training

ALONE = Topology(processes=1, zero=0)
STEPS = 20
"""Steps that are made; the middle one is saved, and gone on from in another process."""
NO_VALIDATION = (
    "train.eval_steps=null",
    "train.early_stopping_patience=null",
    "train.early_stopping_threshold=0",
    "train.load_best_model_at_end=false",
)
"""A validation changes nothing, and takes as long as the validation split is large."""
ROUNDING = {"float32": 1e-3, "bfloat16": 3e-2}
"""Nats per target between two runs on a GPU without train.deterministic, whose sums are made in any order."""
PASSED = "single-GPU checks passed; NCCL not tested"


def start_debug(recipe_file: Path, overrides: Sequence[str]) -> int:
    """Look at a recipe from all sides; return the exit code.

    Raises TrainingError for the first thing that is wrong, and whatever `start_training` raises.
    """
    own = Recipe.load(recipe_file, overrides)
    words = shortened(own, overrides)
    recipe = Recipe.load(recipe_file, words)
    folder = recipe.run_dir
    prepare_if_needed(recipe)
    discard(folder)
    packs, asked = recipe.train.global_batch_size, own.train.global_batch_size
    less = f" of {packs} packs each instead of {asked}" if packs < asked else ""
    say(f"debug mode: {STEPS} steps{less} in one process, in {folder}, which the next debug start removes")
    write_text(folder / FILE, "")
    try:
        code = start_training(recipe, [str(recipe_file), *words], ALONE, module="mistral_dist.debug.worker")
    finally:
        found = show(folder)
    if found is not None:
        raise TrainingError(f"{found.what}: {found.told}")
    return code if code != FINISHED else _resume(recipe_file, words, folder)


def shortened(recipe: Recipe, overrides: Sequence[str]) -> list[str]:
    """The overrides that make a debug run of a recipe: few steps of a few packs, a checkpoint half way, a folder of its own.

    Two micro-batches, or four packs where that is more: enough for accumulation, and a slice of the data.
    """
    packs = min(recipe.train.global_batch_size, max(4, 2 * recipe.train.packs_per_forward))
    return [
        *overrides,
        f"train.steps={STEPS}",
        f"train.epochs={STEPS * packs}",  # as many as it takes: few examples come again
        f"train.global_batch_size={packs}",
        *NO_VALIDATION,
        f"checkpoint.save_steps={STEPS // 2}",
        "checkpoint.save_total_limit=2",
        "log.data_order=true",
        f"run.dir={recipe.run_dir}-debug",
    ]


def discard(folder: Path) -> None:
    """Remove a run of the debug mode. Raises RunError for a folder that is something else, or in use."""
    if not folder.exists():
        return
    check_free(folder)
    if not (folder / FILE).is_file():
        raise RunError(f"{folder}: is no run of the debug mode ({FILE} is missing); move it away, or choose another place with run.dir=...")
    remove(folder)


def show(folder: Path) -> Finding | None:
    """The report so far, on the terminal; return what is wrong, if anything."""
    found = [_read(line) for line in (folder / FILE).read_text(encoding="utf-8").splitlines()]
    for finding in found:
        _show(finding)
    return next((finding for finding in found if not finding.ok), None)


def _resume(recipe_file: Path, words: Sequence[str], folder: Path) -> int:
    """Go on from the checkpoint half way in another process, and compare."""
    again, half = folder / "resumed", f"checkpoint-{STEPS // 2}"
    shutil.copytree(folder / "checkpoints" / half, again / "checkpoints" / half)
    words = [*words, f"run.dir={again}"]
    recipe = Recipe.load(recipe_file, words)
    code = start_training(recipe, [str(recipe_file), *words], ALONE)
    if code != FINISHED:
        return code
    has_gpu = launcher.visible_gpus() > 0
    rounding = ROUNDING["float32" if recipe.model.dtype == "float32" else "bfloat16"]
    finding = resumed(folder, again, STEPS // 2 + 1, STEPS, exact=recipe.train.deterministic or not has_gpu, rounding=rounding)
    _show(finding)
    if not finding.ok:
        raise TrainingError(f"{finding.what}: {finding.told}")
    if not has_gpu:
        say("there is no GPU here: what was checked is the same code in one process on the CPU")
    say(PASSED, "bold")
    return FINISHED


def _read(line: str) -> Finding:
    content: dict[str, Any] = json.loads(line)
    return Finding(content["what"], content["ok"], content["told"], tuple(content["lines"]))


def _show(finding: Finding) -> None:
    say(f"{'   ok' if finding.ok else 'WRONG'}  {finding.what}: {finding.told}", None if finding.ok else "bold red")
    for line in finding.lines:
        for part in line.split("\n"):
            say(f"         {part}", "dim")
