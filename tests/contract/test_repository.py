"""What the repository promises about itself: scripts that run, rooms that keep to themselves."""

import ast
import inspect
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mistral_dist import errors

ROOT = Path(__file__).parent.parent.parent
PACKAGE = ROOT / "mistral_dist"
SCRIPTS = sorted([*(ROOT / "launch").glob("*.sh"), *(ROOT / "slurm").glob("*.sh")])
MODULES = sorted(PACKAGE.rglob("*.py"))

SCRIPT_LINES = 120
MODULE_LINES = 400
FUNCTION_LINES = 50


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_there_is_something_to_check() -> None:
    assert all([SCRIPTS, MODULES])


# scripts


@pytest.mark.parametrize("script", SCRIPTS, ids=name)
def test_a_script_is_short_and_can_be_run(script: Path) -> None:
    text = script.read_text()
    assert text.startswith("#!/usr/bin/env bash\n")
    assert len(text.splitlines()) < SCRIPT_LINES
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", str(script)], check=True)


@pytest.mark.parametrize("script", SCRIPTS, ids=name)
@pytest.mark.parametrize("option", ["-h", "--help"])
def test_a_script_explains_itself(script: Path, option: str, tmp_path: Path) -> None:
    done = subprocess.run([script, option], cwd=tmp_path, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr
    assert f"{script.parent.name}/{script.name}" in done.stdout
    assert "#SBATCH" not in done.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=name)
def test_shellcheck_finds_nothing(script: Path) -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(["shellcheck", str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_no_script_lets_slurm_fill_in_a_variable_that_it_does_not() -> None:
    for script in SCRIPTS:
        assert not re.search(r"^#SBATCH.*\$", script.read_text(), re.MULTILINE), name(script)


# rooms


def outside(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, what) of each use of what only the runtime may use."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
        else:
            continue
        for found in names:
            if found.split(".")[0] in ("accelerate", "deepspeed") and not isinstance(node, ast.Attribute):
                yield node.lineno, found
            if re.match(r"(torch\.distributed|os\.environ|os\.getenv|os\.putenv)\b", found):
                yield node.lineno, found


@pytest.mark.parametrize("file", MODULES, ids=name)
def test_only_the_runtime_knows_launchers_ranks_and_environment(file: Path) -> None:
    found = list(outside(ast.parse(file.read_text())))
    assert found == [] or file.parent.name in ("runtime", "guard"), "the guard runs in vLLM's process, without this package"


def test_the_check_of_rooms_sees_what_it_looks_for() -> None:
    used = {found for file in (PACKAGE / "runtime").glob("*.py") for _, found in outside(ast.parse(file.read_text()))}
    assert {"accelerate", "accelerate.Accelerator", "torch.distributed.barrier", "os.environ"} <= used
    assert any(found.startswith("deepspeed.utils") for found in used)


@pytest.mark.parametrize("file", MODULES, ids=name)
def test_modules_and_functions_are_of_a_size_that_can_be_read(file: Path) -> None:
    text = file.read_text()
    long = {
        node.name: node.end_lineno - node.lineno + 1
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno >= FUNCTION_LINES
    }
    assert long == {}
    assert len(text.splitlines()) <= MODULE_LINES


def undocumented(node: ast.AST, prefix: str = "") -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not child.name.startswith("_"):
            if ast.get_docstring(child) is None:
                yield prefix + child.name
            if isinstance(child, ast.ClassDef):
                yield from undocumented(child, f"{child.name}.")


@pytest.mark.parametrize("file", MODULES, ids=name)
def test_what_is_public_says_what_it_is(file: Path) -> None:
    tree = ast.parse(file.read_text())
    assert ast.get_docstring(tree)
    assert list(undocumented(tree)) == []


@pytest.mark.parametrize("module", ["mistral_dist.config", "mistral_dist.cli", "mistral_dist.assets", "mistral_dist.run"])
def test_a_mistyped_recipe_need_not_wait_for_torch(module: str) -> None:
    heavy = ("torch", "transformers", "accelerate", "deepspeed", "datasets", "bitsandbytes")
    code = f"import sys, {module}; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_worker_need_not_wait_for_the_compiler() -> None:
    code = "import sys, mistral_dist.train, torch; print('torch._inductor.compile_fx' in sys.modules, torch.compile.__module__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "torch"]


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["train", "--nope"], "--nope"),
        (["train"], "Missing argument 'RECIPE'; see `mistral-dist train --help`"),
        (["nope"], "No such command 'nope'"),
        (["train", "r.yaml", "--zero", "4"], "'--zero'"),
        (["train", "r.yaml", "--gpus", "four"], "'--gpus'"),
        (["train", "r.yaml", "--node-rank", "-1"], "'--node-rank'"),
        (["evaluate", "runs/x", "--gpus", "1", "--processes", "1"], "no run there"),
    ],
)
def test_a_mistyped_command_is_the_users_error(words: list[str], shown: str) -> None:
    command = [sys.executable, "-m", "mistral_dist.cli", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == errors.WRONG_INPUT
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert shown in line
    assert done.stdout == ""


def test_without_a_word_the_command_shows_what_it_can_do() -> None:
    done = subprocess.run([sys.executable, "-m", "mistral_dist.cli"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "prepare" in done.stdout


# packaging


def canonical(requirement: str) -> str:
    found = re.match(r"[\w.-]+", requirement)
    assert found is not None
    return re.sub(r"[-_.]+", "-", found[0]).lower()


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def constraints() -> dict[str, str]:
    lines = (ROOT / "configs" / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line.strip() and not line.startswith("#")]
    return {canonical(line): line for line in pins}


@pytest.mark.parametrize("extra", ["", "demo"])
def test_every_dependency_is_pinned_in_the_constraints(extra: str) -> None:
    wanted = project()["optional-dependencies"][extra] if extra else project()["dependencies"]
    assert {canonical(requirement) for requirement in wanted} - constraints().keys() == set()


def test_every_constraint_is_one_version_that_its_floor_allows() -> None:
    from packaging.requirements import Requirement

    pins = {key: Requirement(line) for key, line in constraints().items()}
    for key, pin in pins.items():
        assert re.fullmatch(r"==[\d.]+", str(pin.specifier)), key
    for requirement in map(Requirement, project()["dependencies"]):
        (pinned,) = pins[canonical(requirement.name)].specifier
        assert requirement.specifier.contains(pinned.version), requirement


def test_every_import_is_of_a_dependency() -> None:
    """What a module imports is ours, of the standard library, or named in pyproject.toml."""
    extras = [requirement for extra in project()["optional-dependencies"].values() for requirement in extra]
    named = {canonical(requirement) for requirement in [*project()["dependencies"], *extras]}
    of = {"yaml": "pyyaml"}
    for file in MODULES:
        for node in ast.walk(ast.parse(file.read_text())):
            imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            imported += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for found in {module.split(".")[0] for module in imported} - {"mistral_dist"} - sys.stdlib_module_names:
                assert canonical(of.get(found, found)) in named, f"{name(file)}: {found}"


def test_nothing_that_compiles_is_in_what_a_first_user_installs() -> None:
    extras = project()["optional-dependencies"]
    for requirement in [*project()["dependencies"], *extras["demo"], *extras["gpu"], *extras["dev"]]:
        assert canonical(requirement) != "flash-attn"


# errors


def classes(module: ModuleType) -> list[type[errors.MistralDistError]]:
    return [thing for _, thing in inspect.getmembers(module, inspect.isclass) if issubclass(thing, errors.MistralDistError)]


def drawn() -> dict[str, tuple[int, str]]:
    """The tree of the docstring: class -> (depth, exit code of its branch where it is written)."""
    lines = re.findall(r"^([ │├└─]*)(\w+Error)\b +(\d?)", errors.__doc__ or "", re.MULTILINE)
    return {found: (len(branch.replace("    ", "\t").strip()) and branch.index("─") // 4, code) for branch, found, code in lines}


def test_the_tree_of_errors_is_drawn_as_it_is() -> None:
    tree = drawn()
    assert tree.keys() == {error.__name__ for error in classes(errors)}
    for error in classes(errors):
        depth, code = tree[error.__name__]
        assert depth == len(error.__mro__) - len(errors.MistralDistError.__mro__), error.__name__
        assert code in ("", str(error.exit_code)), error.__name__
        assert code or issubclass(error, errors.UserError), error.__name__


def test_the_exit_codes_are_those_of_the_contract() -> None:
    assert (errors.FINISHED, errors.FAILED, errors.WRONG_INPUT, errors.STOPPED) == (0, 1, 2, 85)
    assert {error.__name__: error.exit_code for error in classes(errors)} == {
        "MistralDistError": 1,
        "UserError": 2,
        "RecipeError": 2,
        "DataError": 2,
        "ModelError": 2,
        "MachineError": 2,
        "RunError": 2,
        "CheckpointError": 1,
        "TrainingError": 1,
    }


def test_the_recipe_in_the_chapter_on_data_is_one() -> None:
    """The YAML of docs/data.md, put into a recipe."""
    import yaml

    from mistral_dist.config import Data

    text = (ROOT / "docs" / "data.md").read_text()
    (block,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    data = Data.model_validate(yaml.safe_load(block)["data"])
    assert len(data.sources) == 4
    assert data.benchmarks
