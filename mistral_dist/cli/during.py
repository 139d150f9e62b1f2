"""The verbs of training itself: to train, to see how it stands, and all of it at once."""

from pathlib import Path
from typing import Annotated

import typer

from mistral_dist.cli.words import Gpus, Overrides, Processes, RecipeFile, RunFolder, app
from mistral_dist.errors import FINISHED, STOPPED, RecipeError

ALONE = (
    "--debug: one process without ZeRO on one machine, always begun anew; no --gpus, --processes, --zero, --offload, --config-file,"
    " --nodes, --fresh or --check, and no job of several nodes"
)


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


@app.command(epilog="Example: `mistral-dist demo`, as often as you like: it goes on where it was")
def demo(
    overrides: Overrides = None,
    recipe_file: Annotated[Path | None, typer.Option("--recipe", help="Another recipe for the same data")] = None,
) -> None:
    """From nothing to a fine-tuned, evaluated model: a real 135M model, real text, no hub, no GPU needed."""
    from mistral_dist import assets
    from mistral_dist.tour import show

    raise typer.Exit(show(recipe_file or assets.find("configs/recipes/demo.yaml"), overrides or []))
