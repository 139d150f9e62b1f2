"""What configs/ promises: every recipe goes with every way to launch and every ZeRO stage, as Accelerate and DeepSpeed read them.

`accelerate launch` itself parses the line, reads the YAML and fills the workers' environment; only what it would start is caught.
"""

import argparse
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
import yaml

from mistral_dist import errors
from mistral_dist.config import Recipe
from mistral_dist.runtime.nodes import Nodes
from mistral_dist.runtime.zero import deepspeed_config, resolve_deepspeed
from mistral_dist.topology import Topology, training_line

ROOT = Path(__file__).parent.parent.parent
RECIPES = sorted((ROOT / "configs" / "recipes").glob("*.yaml"))
ACCELERATE = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))
DEEPSPEED = sorted((ROOT / "configs" / "deepspeed").glob("*.json"))
DECIDED = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size", "gradient_clipping")
"""What the recipe decides."""

SECOND = Nodes(count=2, rank=1, address="gpu1", port=29511)
WAYS = {
    "single_gpu": Topology(processes=1, zero=0),
    "data_parallel": Topology(processes=2, zero=0),
    "data_parallel, two nodes": Topology(processes=1, zero=0, nodes=SECOND),
    "multi_gpu": Topology(processes=2),
    "multi_gpu, one process": Topology(processes=1),
    "multi_node": Topology(processes=1, nodes=SECOND),
}
"""Every accelerate config, as `mistral-dist train` comes to it."""

UNSHARDED = ("single_gpu", "data_parallel")
"""The configs without ZeRO."""


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def triples() -> Iterator[Any]:
    for recipe in RECIPES:
        for way in WAYS:
            for deepspeed in [None] if way.startswith(UNSHARDED) else DEEPSPEED:
                yield pytest.param(recipe, way, deepspeed, id=f"{recipe.stem}-{way}-{deepspeed.stem if deepspeed else 'without'}")


@dataclass(frozen=True)
class Launched:
    """What `accelerate launch` would have started."""

    environment: dict[str, str]
    """Of the workers."""
    agent: argparse.Namespace | None
    """The options of torchrun's agent; None where Accelerate starts the one worker by itself."""


class CaughtError(Exception):
    """Raised in the place of a start."""


@pytest.fixture
def launch(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], Launched]:
    """Runs `accelerate launch` with these arguments, up to the moment at which something would be started."""
    import torch.distributed.run
    from accelerate.commands import launch as accelerate

    caught: list[Launched] = []

    def agent(options: argparse.Namespace) -> NoReturn:
        caught.append(Launched(dict(os.environ), options))
        raise CaughtError

    def alone(command: list[str], env: dict[str, str]) -> NoReturn:
        caught.append(Launched(env, None))
        raise CaughtError(command)

    for variable in [variable for variable in os.environ if variable.startswith("ACCELERATE_")]:
        monkeypatch.delenv(variable)
    monkeypatch.setattr(torch.distributed.run, "run", agent)
    monkeypatch.setattr(accelerate, "subprocess", SimpleNamespace(Popen=alone))

    def launch(arguments: list[str]) -> Launched:
        with pytest.raises(CaughtError):
            accelerate.launch_command(accelerate.launch_command_parser().parse_args(arguments))
        return caught.pop()

    return launch


def test_there_is_one_config_for_each_way_to_launch() -> None:
    assert RECIPES
    assert {file.stem for file in ACCELERATE} == {way.partition(",")[0] for way in WAYS}
    assert {file.stem for file in DEEPSPEED} == {"zero1", "zero2", "zero2_offload", "zero3", "zero3_offload"}


# recipes


@pytest.mark.parametrize("recipe", RECIPES, ids=name)
def test_every_recipe_loads_and_survives_being_written(recipe: Path, tmp_path: Path) -> None:
    loaded = Recipe.load(recipe)
    (tmp_path / recipe.name).write_text(loaded.dump())
    assert Recipe.load(tmp_path / recipe.name) == loaded


@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if recipe.stem.startswith("mistral7b")], ids=name)
def test_every_recipe_of_a_7b_can_use_a_whole_node(recipe: Path) -> None:
    assert Recipe.load(recipe).train.global_batch_size >= 8


# all three together


@pytest.mark.parametrize(("recipe", "way", "deepspeed"), triples())
def test_a_recipe_is_launched_as_its_config_says(
    recipe: Path,
    way: str,
    deepspeed: Path | None,
    launch: Callable[[list[str]], Launched],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From any folder, by the line that `mistral-dist train` prints."""
    monkeypatch.chdir(tmp_path)
    asked = WAYS[way]
    if deepspeed is not None:
        asked = Topology(asked.processes, zero=int(deepspeed.stem[4]), offload=deepspeed.stem.endswith("_offload"), nodes=asked.nodes)
    loaded = Recipe.load(recipe)
    line = training_line(loaded, [str(recipe)], asked)
    assert line.config == ROOT / "configs" / "accelerate" / f"{way.partition(',')[0]}.yaml"
    launched = launch(line.arguments())
    assert list(tmp_path.iterdir()) == [], "nothing is written for other machines to read"
    ranks = (asked.processes or 0) * (asked.nodes.count if asked.nodes else 1)
    assert_workers(launched, asked.processes or 0, asked.nodes)
    assert_precision_is_the_recipes(launched)
    assert_stage(launched, deepspeed, loaded, ranks, monkeypatch)


@pytest.mark.parametrize("file", ACCELERATE, ids=name)
def test_a_config_does_for_a_bare_accelerate_launch(
    file: Path, launch: Callable[[list[str]], Launched], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As its comments say, in a checkout: `accelerate launch --config_file ... -m mistral_dist.train RECIPE`."""
    monkeypatch.chdir(ROOT)
    several = file.stem == "multi_node"
    more = ["--machine_rank", "1", "--main_process_ip", SECOND.address, "--main_process_port", str(SECOND.port)] if several else []
    chat = ROOT / "configs" / "recipes" / "mistral7b_chat.yaml"
    launched = launch(["--config_file", name(file), *more, "-m", "mistral_dist.train", str(chat)])
    processes = {"single_gpu": 1, "data_parallel": 2, "multi_gpu": 2, "multi_node": 8}[file.stem]
    assert_workers(launched, processes, SECOND if several else None)
    assert_precision_is_the_recipes(launched)
    deepspeed = None if file.stem in UNSHARDED else ROOT / "configs" / "deepspeed" / "zero2.json"
    assert_stage(launched, deepspeed, Recipe.load(chat), processes * (2 if several else 1), monkeypatch)


def assert_workers(launched: Launched, processes: int, nodes: Nodes | None) -> None:
    """As many on each node as were asked for, where they were asked for; by torchrun's agent where there are several, or under ZeRO."""
    if launched.agent is None:
        assert (processes, nodes) == (1, None), "only torchrun starts several"
        return
    agent = vars(launched.agent)
    assert agent["nproc_per_node"] == str(processes)
    if nodes is None:
        assert agent["nnodes"] in (None, "1:1", "1", 1)
        return
    assert (agent["nnodes"], agent["node_rank"]) == (str(nodes.count), nodes.rank)
    assert (agent["rdzv_backend"], agent["rdzv_endpoint"]) == ("static", f"{nodes.address}:{nodes.port}")


def assert_precision_is_the_recipes(launched: Launched) -> None:
    """Neither Accelerate nor DeepSpeed casts; and no process is kept from a GPU, which would leave DeepSpeed out, too."""
    assert launched.environment["ACCELERATE_MIXED_PRECISION"] == "no"
    assert launched.environment.get("ACCELERATE_USE_CPU", "False") == "False"


def assert_stage(launched: Launched, file: Path | None, recipe: Recipe, ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed is used, and with this file, where ZeRO was asked for, and nowhere else."""
    environment = {key: value for key, value in launched.environment.items() if key.startswith("ACCELERATE_")}
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    config = deepspeed_config(recipe, ranks)
    if file is None:
        assert environment.get("ACCELERATE_USE_DEEPSPEED", "false") == "false"
        assert config is None
        return
    assert environment["ACCELERATE_USE_DEEPSPEED"] == "true"
    assert environment["ACCELERATE_DEEPSPEED_ZERO3_INIT"] == "false", "quantized weights cannot be made sharded"
    assert Path(environment["ACCELERATE_DEEPSPEED_CONFIG_FILE"]).samefile(file)
    assert config == resolve_deepspeed(json.loads(file.read_text()), recipe, ranks)


# accelerate


@pytest.mark.parametrize("file", ACCELERATE, ids=name)
def test_accelerate_knows_all_that_a_config_says(file: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    said: dict[str, Any] = yaml.safe_load(file.read_text())
    config: Any = load_config_from_file(str(file))
    assert said["use_cpu"] is config.use_cpu is False, "use_cpu: true silently leaves DeepSpeed out"
    assert str(getattr(config, "mixed_precision", None) or "no") == "no", "the recipe's model.dtype decides"
    assert "same_network" not in said, "Accelerate takes it from the command line only"
    is_zero = str(config.distributed_type).endswith("DEEPSPEED")
    assert bool(config.deepspeed_config) == is_zero == (file.stem not in UNSHARDED)
    if is_zero:
        assert (ROOT / said["deepspeed_config"]["deepspeed_config_file"]) in DEEPSPEED
        assert said["deepspeed_config"]["zero3_init_flag"] is False
    assert (config.num_processes == 1) == str(config.distributed_type).endswith("NO"), "Accelerate by itself starts one"
    if config.num_machines > 1:
        assert said["deepspeed_config"]["deepspeed_multinode_launcher"] == "standard", "pdsh writes the environment to a file"


# deepspeed


@pytest.mark.parametrize("recipe", RECIPES, ids=name)
@pytest.mark.parametrize("deepspeed", DEEPSPEED, ids=name)
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_every_recipe_fits_every_stage(recipe: Path, deepspeed: Path, ranks: int) -> None:
    loaded = Recipe.load(recipe)
    packs = loaded.train.global_batch_size
    config = json.loads(deepspeed.read_text())
    if ranks > packs:
        with pytest.raises(errors.RecipeError, match=rf"train\.global_batch_size={packs}: cannot be shared by {ranks} GPUs"):
            resolve_deepspeed(config, loaded, ranks)
        return
    found = resolve_deepspeed(config, loaded, ranks)
    assert "auto" not in json.dumps(found)
    micro, accumulation = found["train_micro_batch_size_per_gpu"], found["gradient_accumulation_steps"]
    assert found["train_batch_size"] == micro * accumulation * ranks >= packs


@pytest.mark.parametrize("recipe", RECIPES, ids=name)
@pytest.mark.parametrize("deepspeed", DEEPSPEED, ids=name)
def test_deepspeed_reads_what_the_recipe_made_of_a_stage(recipe: Path, deepspeed: Path) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    loaded = Recipe.load(recipe)
    read: Any = DeepSpeedConfig(resolve_deepspeed(json.loads(deepspeed.read_text()), loaded, 1))
    assert read.grad_accum_dtype == "fp32"
    assert not (read.bfloat16_config.enabled or read.float16_config.enabled or read.torch_autocast_enabled)
    assert read.train_batch_size == loaded.train.global_batch_size
    assert read.gradient_clipping == loaded.optim.max_grad_norm
    assert read.zero_config.stage == int(deepspeed.stem[4])
    assert (read.zero_config.offload_optimizer is not None) == deepspeed.stem.endswith("_offload")


@pytest.mark.parametrize("file", DEEPSPEED, ids=name)
def test_a_stage_accumulates_in_float32_and_leaves_the_recipe_its_numbers(file: Path) -> None:
    config = json.loads(file.read_text())
    assert config["data_types"] == {"grad_accum_dtype": "fp32"}
    assert config.keys() & {"bf16", "fp16", "amp", "torch_autocast", "optimizer", "scheduler"} == set()
    assert {key: config.get(key) for key in DECIDED} == dict.fromkeys(DECIDED, "auto")
    offload = "_offload" if "offload_optimizer" in config["zero_optimization"] else ""
    assert file.stem == f"zero{config['zero_optimization']['stage']}{offload}"


def test_what_all_stages_share_is_the_same_in_all() -> None:
    """DeepSpeed passes over a top-level key that it does not know: one that is mistyped would differ from the others'."""
    configs = [json.loads(file.read_text()) for file in DEEPSPEED]
    for config in configs:
        del config["zero_optimization"]
        config.pop("zero_force_ds_cpu_optimizer", None)
    assert all(config == configs[0] for config in configs)


@pytest.mark.parametrize("stage", [2, 3])
def test_offload_changes_where_the_optimizer_is_and_nothing_else(stage: int) -> None:
    plain, offloaded = (json.loads((ROOT / "configs" / "deepspeed" / f"zero{stage}{kind}.json").read_text()) for kind in ("", "_offload"))
    assert offloaded["zero_optimization"].pop("offload_optimizer") == {"device": "cpu", "pin_memory": True}
    assert offloaded.pop("zero_force_ds_cpu_optimizer") is False
    assert offloaded == plain


# the options of `mistral-dist train`


@pytest.mark.parametrize(
    ("zero", "offload", "wanted"),
    [(None, True, "zero2_offload"), (2, True, "zero2_offload"), (3, True, "zero3_offload"), (3, False, "zero3"), (None, False, "zero2")],
)
def test_the_options_of_train_name_the_stage(zero: int | None, offload: bool, wanted: str) -> None:
    recipe = next(recipe for recipe in RECIPES if recipe.stem == "demo")
    line = training_line(Recipe.load(recipe), [str(recipe)], Topology(processes=2, zero=zero, offload=offload))
    assert line.deepspeed is not None and line.deepspeed.stem == wanted
    assert line.config.stem == "multi_gpu"


@pytest.mark.parametrize("zero", [0, 1])
def test_offload_without_a_stage_that_has_it_is_refused(zero: int) -> None:
    with pytest.raises(errors.RecipeError, match=rf"--offload with --zero {zero}: .*add --zero 2 or --zero 3"):
        training_line(Recipe.load(RECIPES[0]), [], Topology(zero=zero, offload=True))
