"""The verbs after training: they take a RUN, or what was exported of it."""

from pathlib import Path
from typing import Annotated

import typer

from mistral_dist.cli.words import Gpus, Overrides, Processes, RunFolder, app
from mistral_dist.errors import FINISHED


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
    from mistral_dist.display import console, evaluation_table, say
    from mistral_dist.evaluate import held_out, recipe_of
    from mistral_dist.run import RunDirectory
    from mistral_dist.topology import Topology
    from mistral_dist.workflow import start_evaluation

    run = RunDirectory(run_folder)
    recipe = recipe_of(run, overrides or [])
    if check:
        records, _, _ = held_out(recipe, run)
        say(f"{run.path}: adapter, data and base are there; {len(records):,} test examples")
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
    """Write one page, over an older one, without a network: what was asked, how it went, what came of it; or how several runs differ."""
    from mistral_dist.display import say
    from mistral_dist.errors import RunError
    from mistral_dist.files import write_text
    from mistral_dist.report.facts import Facts
    from mistral_dist.report.page import comparison, page
    from mistral_dist.run import RunDirectory

    if out is not None and out.suffix != ".html":  # a report is written over, and nothing else
        raise RunError(f"--out: {out}: give the page a name that ends in .html")
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
                if answer:
                    turns += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
                else:  # which no chat format takes as a turn
                    say("the answer is empty, so the conversation goes on as if this had not been asked")
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
        str, typer.Option("--form", help="adapter, merged-bf16, merged-nf4, or best: the merged one most like the live adapter")
    ] = "best",
    tolerance: Annotated[float, typer.Option("--tolerance", min=0, help="The mean KL, in nats, above which a form is refused")] = 0.1,
    compare: Annotated[bool, typer.Option("--compare/--no-compare", help="Load whole models, one at a time, and compare them")] = True,
) -> None:
    """Write a folder that can be served: the adapter, or a whole model; and measure whether it is the model that was trained."""
    from mistral_dist.display import console, figures_table, say
    from mistral_dist.evaluate import recipe_of
    from mistral_dist.export.forms import form_named
    from mistral_dist.export.verb import Options
    from mistral_dist.export.verb import export as write
    from mistral_dist.run import RunDirectory

    run, options = RunDirectory(run_folder), Options(form_named(form), tolerance, compare)
    recipe = recipe_of(run, overrides or [], ("model.path=", "model.dtype="))
    with console.status("reading the run") as status:
        chosen, rows = write(run, recipe, out, options, status.update)
    if rows:
        console.print(figures_table(rows))
    say(f"{out}: {chosen}")


@app.command(epilog="Examples: `mistral-dist push models/my me/my`; `mistral-dist push models/my me/my --upload`")
def push(
    folder: Annotated[Path, typer.Argument(metavar="EXPORT", help="A folder that `export` has written")],
    name: Annotated[str, typer.Argument(metavar="OWNER/MODEL", help="The repository; made, and private, if it is not there")],
    upload: Annotated[bool, typer.Option("--upload/--dry-run", help="Send it, or say what would be sent")] = False,
) -> None:
    """Put an exported folder on the hub; says what would be sent unless told to send it."""
    from mistral_dist.display import say
    from mistral_dist.export.push import push as send

    send(folder, name, say, upload=upload)


@app.command(
    epilog="Examples: `mistral-dist serve models/my`; `mistral-dist serve runs/a --also runs/b --port 9000`;"
    " `mistral-dist serve models/my --engine /opt/vllm/bin/vllm -- --tensor-parallel-size 2 --max-model-len 8192`"
)
def serve(
    place: Annotated[Path, typer.Argument(metavar="RUN|EXPORT", help="A finished run, or a folder that `export` has written")],
    engine_args: Annotated[list[str] | None, typer.Argument(metavar="[-- ENGINE'S ARGUMENTS]", help="Handed on to it")] = None,
    also: Annotated[list[Path] | None, typer.Option("--also", help="Another adapter of the same base; may be given several times")] = None,
    engine: Annotated[
        str, typer.Option("--engine", envvar="MISTRAL_DIST_ENGINE", help="vllm, transformers, or the path of one of these commands")
    ] = "vllm",
    host: Annotated[str, typer.Option("--host", help="Where to listen; beyond this machine only with a key (VLLM_API_KEY)")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=1, max=65535)] = 8000,
    base: Annotated[Path | None, typer.Option("--base", help="An adapter's base, if it is not where it was in training")] = None,
    check: Annotated[bool, typer.Option("--check", help="Look at model, engine and key, print the command, and leave")] = False,
) -> None:
    """Serve a model to clients of the OpenAI API, on vLLM or `transformers serve`, with the prompts it was trained with."""
    from mistral_dist.display import say
    from mistral_dist.serving.verb import Options
    from mistral_dist.serving.verb import serve as start_engine

    start_engine([place, *(also or [])], Options(engine, host, port, base, tuple(engine_args or [])), say, start=not check)
