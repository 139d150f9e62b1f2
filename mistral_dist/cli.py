"""`mistral-dist VERB ...`: before training a verb takes a RECIPE, afterwards a RUN."""

import sys
import warnings
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from mistral_dist.errors import FAILED, FINISHED, STOPPED, WRONG_INPUT, MistralDistError, RecipeError
from mistral_dist.runtime.process import quiet_libraries

app = typer.Typer(
    name="mistral-dist",
    help="Fine-tune Mistral-7B with QLoRA on any machines: one run, the same result.",
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)

MISTYPED: tuple[type[Exception], ...] = (typer.BadParameter.__base__ or typer.BadParameter,)
"""All that typer finds wrong with a command; it is click's UsageError, which typer keeps in a room of its own."""
INTERRUPTED = 130
"""The exit code after Ctrl-C, as a shell gives it."""
NO_PLACE = (PermissionError, FileExistsError, IsADirectoryError, NotADirectoryError)
"""A path that cannot be written to, or is something else: the user's to mend."""


ALONE = (
    "--debug: one process without ZeRO on one machine, always begun anew; no --gpus, --processes, --zero, --offload, --config-file,"
    " --nodes, --fresh or --check, and no job of several nodes"
)


class Split(StrEnum):
    """The parts of prepared data."""

    train = "train"
    validation = "validation"
    test = "test"


RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe, e.g. configs/recipes/demo.yaml")]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory, e.g. runs/demo")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[section.field=value ...]", help="Overrides of the recipe")]
Processes = Annotated[
    int | None, typer.Option("--processes", min=1, help="How many on each machine; default: all visible GPUs, or 2 CPU processes")
]
Gpus = Annotated[int | None, typer.Option("--gpus", min=1, help="How many on each machine, and refused where fewer are visible")]


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


@app.command(
    epilog="Examples: `mistral-dist train configs/recipes/demo.yaml`;"
    " `mistral-dist train my.yaml optim.learning_rate=1e-4 run.dir=runs/lower`;"
    " `mistral-dist train my.yaml --gpus 4 --zero 3`; on each of two machines, the second with `--node-rank 1`:"
    " `mistral-dist train my.yaml --nodes 2 --node-rank 0 --main-address gpu1:29500`."
    " Exit codes: 0 finished, 85 stopped (run it again), 2 wrong input, 1 else."
)
def train(
    recipe_file: RecipeFile,
    overrides: Overrides = None,
    processes: Processes = None,
    gpus: Gpus = None,
    zero: Annotated[int | None, typer.Option(min=0, max=3, help="ZeRO stage; default: 2 with several processes, else 0")] = None,
    offload: Annotated[
        bool, typer.Option("--offload", help="ZeRO 2 or 3 with the optimizer's state and update in the machine's own memory")
    ] = False,
    config_file: Annotated[Path | None, typer.Option(help="An accelerate config of your own")] = None,
    nodes: Annotated[
        int | None,
        typer.Option(min=1, help="Machines that train together; the same command on each. Default: one, or those of the SLURM step"),
    ] = None,
    node_rank: Annotated[int | None, typer.Option(min=0, help="Which of them this machine is, from 0")] = None,
    main_address: Annotated[
        str | None, typer.Option(metavar="HOST[:PORT]", help="Where the others reach node 0; the same on all. Default port: 29500")
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Look at recipe, data, base and run directory, and leave")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Move an existing run aside and start anew")] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="20 steps in one process without ZeRO, looked at from all sides, in RUN-debug")
    ] = False,
) -> None:
    """Train, or go on from the last good checkpoint, on all visible GPUs; on one machine it also prepares the data if needed."""
    from mistral_dist.runtime.process import leave_when_asked

    leave_when_asked(STOPPED)  # before what takes seconds to import
    from mistral_dist.config import Recipe
    from mistral_dist.display import outlast_terminal
    from mistral_dist.runtime.nodes import nodes_of
    from mistral_dist.topology import Topology
    from mistral_dist.workflow import check_training, start_training

    outlast_terminal()
    words = list(overrides or [])
    recipe = Recipe.load(recipe_file, words)
    several = None if check and nodes is None else nodes_of(nodes, node_rank, main_address)
    if debug:
        from mistral_dist.debug.mode import start_debug

        if any(option not in (None, False) for option in (processes, gpus, zero, offload, config_file, several, fresh, check)):
            raise RecipeError(ALONE)
        raise typer.Exit(start_debug(recipe_file, words))
    asked = Topology(processes, gpus, zero, offload, config_file, several)
    if check:
        check_training(recipe, asked, fresh=fresh)
        raise typer.Exit(FINISHED)
    raise typer.Exit(start_training(recipe, [str(recipe_file), *words], asked, fresh=fresh))


@app.command(
    epilog="Examples: `mistral-dist evaluate runs/demo`;"
    " `mistral-dist evaluate runs/chat evaluate.answers=100 evaluate.metric=my_measures:length`"
)
def evaluate(
    run_folder: RunFolder,
    overrides: Overrides = None,
    processes: Processes = None,
    gpus: Gpus = None,
    check: Annotated[bool, typer.Option("--check", help="Look at run, data and base, and leave")] = False,
) -> None:
    """Score base and tuned model on the held-out test split; writes RUN/evaluation/. Killed, it goes on where it was."""
    from mistral_dist.display import console, evaluation_table
    from mistral_dist.evaluate import held_out, recipe_of
    from mistral_dist.run import RunDirectory
    from mistral_dist.topology import Topology
    from mistral_dist.workflow import start_evaluation

    run = RunDirectory(run_folder)
    recipe = recipe_of(run, overrides or [])
    if check:
        held_out(recipe, run)
        raise typer.Exit(FINISHED)
    console.print(evaluation_table(start_evaluation(run, overrides or [], Topology(processes, gpus))))


@app.command(
    epilog="Examples: `mistral-dist predict runs/demo texts.jsonl --out predicted.jsonl`;"
    " `mistral-dist predict runs/chat questions.jsonl evaluate.batch_size=64 evaluate.max_new_tokens=200`"
)
def predict(
    run_folder: RunFolder,
    file: Annotated[str, typer.Argument(metavar="FILE", help="Rows as those that were trained on, without answers; a file, folder or URL")],
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option("--out", help="One JSON line for each row; default: predicted.jsonl")] = None,
    processes: Processes = None,
    gpus: Gpus = None,
) -> None:
    """Have the tuned model answer each row of a file, on all visible GPUs. Killed, it goes on where it was."""
    from mistral_dist.config import Source
    from mistral_dist.data import sources
    from mistral_dist.display import say
    from mistral_dist.evaluate import recipe_of
    from mistral_dist.run import RunDirectory
    from mistral_dist.topology import Topology
    from mistral_dist.workflow import start_prediction

    run, target = RunDirectory(run_folder), out or Path("predicted.jsonl")
    recipe_of(run, overrides or [])
    sources.check([Source(path=file)])
    answered, errors = start_prediction(run, file, target, overrides or [], Topology(processes, gpus))
    trouble = f"; {len(errors):,} could not be asked, the first is {errors[0]}" if errors else ""
    say(f"{target}: {answered:,} answers{trouble}")


@app.command(epilog="Examples: `mistral-dist report runs/demo`; `mistral-dist report runs/demo runs/rank-32 --out both.html`")
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN ...", help="A run directory, or several to compare with the first")],
    out: Annotated[Path | None, typer.Option("--out", help="Where to; default: RUN/report.html, of several comparison.html")] = None,
) -> None:
    """Write one page, without a network: what was asked, how it went, what came of it; or how several runs differ."""
    from mistral_dist.display import say
    from mistral_dist.files import write_text
    from mistral_dist.report.facts import Facts
    from mistral_dist.report.page import comparison, page
    from mistral_dist.run import RunDirectory

    found = [Facts(RunDirectory(folder)) for folder in runs]
    for facts in found:
        facts.run.recipe()
    file = out or (runs[0] / "report.html" if len(runs) == 1 else Path("comparison.html"))
    write_text(file, page(found[0]) if len(found) == 1 else comparison(found))
    say(f"{file}: open it in a browser")


@app.command(epilog='Examples: `mistral-dist chat runs/demo`; `mistral-dist chat runs/demo --message "Return a sorted copy of an array."`')
def chat(
    run_folder: RunFolder,
    message: Annotated[str | None, typer.Option("--message", "-m", help="Ask this once and leave")] = None,
    tuned: Annotated[bool, typer.Option("--tuned", help="The tuned model alone, in half the time")] = False,
) -> None:
    """Ask base and tuned model in the terminal, side by side; a classifier answers with probabilities."""
    from mistral_dist.answers import MODELS
    from mistral_dist.chat import Chat
    from mistral_dist.display import ask, console, probabilities_table, say
    from mistral_dist.errors import DataError
    from mistral_dist.evaluate import recipe_of
    from mistral_dist.run import RunDirectory

    run = RunDirectory(run_folder)
    recipe = recipe_of(run)
    with console.status("loading the model"):
        session = Chat(recipe, run)
    turns: list[dict[str, str]] = []
    for text in [message] if message is not None else iter(ask, None):
        try:
            if recipe.task.kind == "classification":
                console.print(probabilities_table(session.classify(text, MODELS[tuned:])))
            else:
                for which in MODELS[tuned:]:  # the conversation goes on with the tuned model's answer, which is the last
                    if not tuned:
                        console.print(f"[dim]{which}:[/dim]")
                    answer = session.reply([*turns, {"role": "user", "content": text}], session.printer(), which)
                turns += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
        except DataError as error:
            if message is not None:
                raise
            say(str(error))


@app.command(
    epilog="Examples: `mistral-dist export runs/demo models/demo`;"
    " `mistral-dist export runs/chat models/chat model.dtype=float32 --form merged-nf4 --no-compare`"
)
def export(
    run_folder: RunFolder,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A folder that is not there yet")],
    overrides: Overrides = None,
    form: Annotated[
        str, typer.Option("--form", help="adapter, merged-bf16, merged-nf4, or best: what is most like the live adapter")
    ] = "best",
    tolerance: Annotated[float, typer.Option("--tolerance", min=0, help="The mean KL, in nats, above which a form is refused")] = 0.1,
    compare: Annotated[bool, typer.Option("--compare/--no-compare", help="Load whole models, one at a time, and compare them")] = True,
) -> None:
    """Write a folder that can be served: the adapter, or a whole model; and measure whether it is the model that was trained."""
    from mistral_dist.display import console, figures_table, say
    from mistral_dist.evaluate import CHOICES, recipe_of
    from mistral_dist.export.forms import form_named
    from mistral_dist.export.verb import Wish
    from mistral_dist.export.verb import export as write
    from mistral_dist.run import RunDirectory

    run, wish = RunDirectory(run_folder), Wish(form_named(form), tolerance, compare)
    recipe = recipe_of(run, overrides or [], (*CHOICES, "model.dtype="))
    with console.status("reading the run") as status:
        chosen, rows = write(run, recipe, out, wish, status.update)
    if rows:
        console.print(figures_table(rows))
    say(f"{out}: {chosen}")


@app.command(epilog="Examples: `mistral-dist status runs/demo`; `mistral-dist status runs/demo --follow`")
def status(run_folder: RunFolder, follow: Annotated[bool, typer.Option("--follow", help="Until it ends")] = False) -> None:
    """Say how a run stands."""
    from mistral_dist.display import console
    from mistral_dist.run import RunDirectory
    from mistral_dist.standing import follow_to_the_end, standing

    run = RunDirectory(run_folder)
    if follow:
        follow_to_the_end(run)
    console.print(standing(run))


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


@app.command(epilog="Example: `mistral-dist demo`, as often as you like: it goes on where it was")
def demo(
    overrides: Overrides = None,
    recipe_file: Annotated[Path | None, typer.Option("--recipe", help="Another recipe for the same data")] = None,
) -> None:
    """From nothing to a fine-tuned, evaluated model: a real 135M model, real text, no hub, no GPU needed."""
    from mistral_dist import assets
    from mistral_dist.tour import show

    raise typer.Exit(show(recipe_file or assets.find("configs/recipes/demo.yaml"), overrides or []))


def _told(error: Any) -> str:
    """A mistyped command in one line, like every other mistake."""
    context = getattr(error, "ctx", None)
    verb = f" {context.info_name}" if context is not None and context.parent is not None else ""
    line = " ".join(error.format_message().split()).rstrip(".")
    return f"error: {line}; see `mistral-dist{verb} --help`"


def main() -> None:
    """The command `mistral-dist`: exits with 0, 1, 2 or 85, never with a traceback for what the user can mend."""
    quiet_libraries()
    warnings.simplefilter("ignore", FutureWarning)  # between the libraries; nothing a user could do about
    try:
        sys.exit(app(sys.argv[1:] or ["--help"], standalone_mode=False))
    except typer.Abort:
        sys.exit(INTERRUPTED)
    except MISTYPED as error:
        print(_told(error), file=sys.stderr)
        sys.exit(WRONG_INPUT)
    except OSError as error:
        print(f"error: {error.filename or 'system'}: {error.strerror or error}", file=sys.stderr)
        sys.exit(WRONG_INPUT if isinstance(error, NO_PLACE) else FAILED)
    except MistralDistError as error:
        from rich.markup import escape

        from mistral_dist.display import errors

        errors.print(f"[red]error:[/red] {escape(str(error))}", soft_wrap=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
