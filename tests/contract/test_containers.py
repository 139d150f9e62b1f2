"""What containers/ promises: both images are the tested versions on the tested Python, and nothing is left in them that need not be.

Neither can be built where the tests run: no engine, no base image. hadolint and shellcheck read them as their engines would.
"""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent.parent
DOCKERFILE = ROOT / "containers" / "Dockerfile"
IGNORED = ROOT / "containers" / "Dockerfile.dockerignore"
DEFINITION = ROOT / "containers" / "mistral-dist.def"
COPIED = {"pyproject.toml", "README.md", "LICENSE", "configs", "launch", "slurm", "mistral_dist"}
"""What the package is built from."""


def instructions() -> list[tuple[str, str]]:
    """(instruction, rest) of each line of the Dockerfile."""
    text = "\n".join(line for line in DOCKERFILE.read_text().splitlines() if not line.startswith("#")).replace("\\\n", " ")
    return [(words[0], words[1].strip()) for line in text.splitlines() if (words := line.split(maxsplit=1))]


def sections() -> dict[str, str]:
    """The sections of the Apptainer definition; `` is its head."""
    head, *parts = re.split(r"^%(\w+)\n", DEFINITION.read_text(), flags=re.MULTILINE)
    return {"": head, **dict(zip(parts[::2], parts[1::2], strict=True))}


def commands() -> dict[str, list[str]]:
    """What each of the two runs as it is built, a command each; of the Dockerfile in both stages."""
    runs = [rest for instruction, rest in instructions() if instruction == "RUN"]
    both = {"Dockerfile": "\n".join(re.split(r" && ", "\n".join(runs))), "definition": sections()["post"]}
    return {
        which: [line.strip() for line in text.splitlines() if line.strip() and not line.strip().startswith("#")]
        for which, text in both.items()
    }


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_hadolint_finds_nothing() -> None:
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not installed")
    done = subprocess.run([hadolint, "--no-color", str(DOCKERFILE)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("section", ["post", "environment", "runscript", "test"])
def test_shellcheck_finds_nothing_in_the_definition(section: str) -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(["shellcheck", "--shell=sh", "-"], input=sections()[section], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_both_stand_on_the_python_that_was_tested() -> None:
    bases = [rest.split()[0] for instruction, rest in instructions() if instruction == "FROM"]
    bases += re.findall(r"^From: (\S+)$", sections()[""], re.MULTILINE)
    assert len(bases) == 3
    assert len(set(bases)) == 1
    tag = re.fullmatch(r"python:(\d+\.\d+)\.\d+-slim-\w+", bases[0])
    assert tag is not None, "an image that is pinned to the patch and to the release of Debian"
    assert f"on Python {tag[1]} " in (ROOT / "configs" / "constraints.txt").read_text()
    assert re.search(r"^Bootstrap: docker$", sections()[""], re.MULTILINE)


@pytest.mark.parametrize("which", ["Dockerfile", "definition"])
def test_libraries_are_those_of_the_constraints_and_nothing_is_compiled(which: str) -> None:
    installs = [line for line in commands()[which] if "pip install" in line]
    assert installs
    for line in installs:
        assert re.search(r"--constraint (configs/)?constraints\.txt", line) or "--no-deps wheel/*.whl" in line, line
    assert installs[0].endswith(" torch"), "the largest layer, which changes least"
    for line in [line for line in commands()[which] if re.search(r"pip (install|wheel)", line)]:
        assert "--no-cache-dir" in line
        assert "flash-attn" not in line
        assert "[dev" not in line
        assert "==" not in line, "versions stand in the constraints alone"
    assert any(re.fullmatch(r"(\S*/)?pip check", line) for line in commands()[which])


def test_the_dockerfile_installs_what_the_project_needs() -> None:
    """Its line of Python, run: the libraries stand in a layer of their own, without the package."""
    (line,) = [line for line in commands()["Dockerfile"] if line.startswith("python -c ")]
    code = re.search(r"python -c '(.*)' > libraries\.txt", line)
    assert code is not None
    done = subprocess.run([sys.executable, "-c", code[1]], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [*project()["dependencies"], *project()["optional-dependencies"]["demo"]]


@pytest.mark.parametrize("which", ["Dockerfile", "definition"])
def test_what_apt_fetched_is_gone(which: str) -> None:
    if which == "Dockerfile":
        for instruction, rest in instructions():
            assert "apt-get" not in rest or (instruction == "RUN" and rest.endswith("rm -rf /var/lib/apt/lists/*")), "in the same layer"
    lines = commands()[which]
    (install,) = [line for line in lines if line.startswith("apt-get install")]
    assert "--no-install-recommends" in install
    assert lines.index("apt-get update") < lines.index(install) < lines.index("rm -rf /var/lib/apt/lists/*")


def test_both_hold_the_same_libraries_of_the_system() -> None:
    """The Dockerfile a first process beside them; under Apptainer that is the host's."""
    fetched = {
        which: {word for line in lines if line.startswith("apt-get install") for word in line.split()[2:]}
        for which, lines in commands().items()
    }
    assert fetched["Dockerfile"] - fetched["definition"] == {"tini"}
    assert fetched["definition"] - fetched["Dockerfile"] == set()


def test_both_take_the_same_files_of_the_checkout_and_no_others() -> None:
    copies = [rest.split() for instruction, rest in instructions() if instruction == "COPY" and "--from" not in rest]
    sources = {source for *found, _ in copies for source in found}
    assert sources == COPIED | {"configs/constraints.txt"}
    taken = [line.split() for line in sections()["files"].strip().splitlines()]
    assert {source for source, _ in taken} == COPIED
    assert all(target == f"/opt/install/{source}" for source, target in taken)
    assert all((ROOT / source).exists() for source in sources)
    lines = [line for line in IGNORED.read_text().splitlines() if not line.startswith("#")]
    assert lines[0] == "*"
    assert {line[1:] for line in lines if line.startswith("!")} == COPIED


def test_the_command_is_mistral_dist_and_not_roots() -> None:
    found = dict(instructions())  # the last of each
    assert found["ENTRYPOINT"] == '["tini", "--", "mistral-dist"]'
    assert found["USER"].isdigit()
    assert int(found["USER"]) > 0
    assert sections()["runscript"].strip() == 'exec mistral-dist "$@"'
    named = " ".join(rest for instruction, rest in instructions() if instruction == "ENV")
    assert "HF_HOME=/cache/" in named
    assert "MISTRAL_DIST_CACHE=/cache/" in named


@pytest.mark.parametrize("file", [DOCKERFILE, DEFINITION], ids=lambda file: file.name)
def test_the_head_says_how_it_is_built_and_run(file: Path) -> None:
    head = re.match(r"(#.*\n)+", file.read_text())
    assert head is not None
    for word in ("Build,", "Run,", f"containers/{file.name}", "train my.yaml", "not yet built"):
        assert word in head[0]
