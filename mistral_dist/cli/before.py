"""The verbs before training: they take a RECIPE."""

from pathlib import Path
from typing import Annotated

import typer

from mistral_dist.cli.words import Overrides, RecipeFile, Split, app


@app.command(epilog="Example: `mistral-dist init my-project`")
def init(folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where to; made if missing")]) -> None:
    """Lay out commented recipes, configs, launch and SLURM scripts to start from."""
    from mistral_dist import assets
    from mistral_dist.display import say

    files = assets.lay_out(folder)
    recipe = "configs/recipes/mistral7b_chat.yaml"
    say(f"{len(files)} files in {folder}. Next, there: set data.sources in {recipe} (or another one) to your data, and")
    for verb in ("fetch", "prepare", "train"):
        say(f"  mistral-dist {verb} {recipe}")


@app.command(epilog="Example: `mistral-dist fetch configs/recipes/mistral7b_chat.yaml`")
def fetch(recipe_file: RecipeFile, overrides: Overrides = None) -> None:
    """Download what a recipe names (base model, hub data); afterwards everything works offline."""
    from mistral_dist.config import Recipe
    from mistral_dist.display import console
    from mistral_dist.hub import fetch_data, fetch_model

    recipe = Recipe.load(recipe_file, overrides or [])
    console.print(f"{recipe.model.name}: {fetch_model(recipe.model)}", soft_wrap=True)
    for source in recipe.data.sources:
        if source.name is not None:
            fetch_data(source)
            console.print(f"{source.name}[{source.split}]: here")


@app.command(epilog="Example: `mistral-dist prepare configs/recipes/demo.yaml data.near_duplicates=0.9`")
def prepare(recipe_file: RecipeFile, overrides: Overrides = None) -> None:
    """Collect, clean, de-duplicate, split and measure the data, once, into memory-mapped shards."""
    from mistral_dist.config import Recipe
    from mistral_dist.display import audit_table, console
    from mistral_dist.workflow import prepare_if_needed

    recipe = Recipe.load(recipe_file, overrides or [])
    prepared = prepare_if_needed(recipe, again=True)
    console.print(audit_table(prepared.manifest, prepared.path))


@app.command(epilog="Examples: `mistral-dist preview my.yaml`; `mistral-dist preview my.yaml --examples 20 --html preview.html`")
def preview(
    recipe_file: RecipeFile,
    overrides: Overrides = None,
    examples: Annotated[int, typer.Option("--examples", min=1, help="How many")] = 5,
    html: Annotated[Path | None, typer.Option("--html", help="Write one page that needs no network, instead of the terminal")] = None,
    split: Annotated[Split, typer.Option("--split", help="Of which split")] = Split.train,
) -> None:
    """Show examples as the model sees them: every token, and which of them it learns; before or after `prepare`."""
    from rich.text import Text

    from mistral_dist.config import Recipe
    from mistral_dist.data.encode import load_encoder
    from mistral_dist.display import console, say
    from mistral_dist.files import write_text
    from mistral_dist.preview import as_html, as_plain, as_terminal, pages_of

    recipe = Recipe.load(recipe_file, overrides or [])
    pages = pages_of(recipe, load_encoder(recipe), examples, split)
    if html is None:
        console.print(as_terminal(pages) if console.is_terminal else Text(as_plain(pages)), soft_wrap=True)
    else:
        write_text(html, as_html(pages, recipe_file.name))
        say(f"{html}: {len(pages)} example{'s' if len(pages) != 1 else ''}")


@app.command(epilog="Example: `mistral-dist doctor`")
def doctor() -> None:
    """Look at this machine: versions, GPUs, attention kernels, disk, hub."""
    from rich.markup import escape

    from mistral_dist.display import console
    from mistral_dist.doctor import examine

    for finding in examine():
        mark = "[green]  ok[/green]" if finding.ok else "[yellow]look[/yellow]"
        remedy = f"  [dim]{escape(finding.remedy)}[/dim]" if finding.remedy else ""
        console.print(f"{mark}  {finding.what:<14} {escape(finding.found)}{remedy}", soft_wrap=True)
