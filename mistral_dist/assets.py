"""The files that come with the package: configs, launch and SLURM scripts.

In a checkout they stand beside the package; an installed wheel carries them inside it. `mistral-dist init` copies them to
where the user can change them.
"""

import shutil
from pathlib import Path

from mistral_dist.errors import RunError

FOLDERS = ("configs", "launch", "slurm")
_PACKAGE = Path(__file__).parent


def root() -> Path:
    """The folder that holds FOLDERS."""
    inside = _PACKAGE / "_assets"
    return inside if inside.is_dir() else _PACKAGE.parent


def find(relative: str) -> Path:
    """A file such as `configs/deepspeed/zero2.json`: the user's own from the current folder, else the package's."""
    own = Path(relative)
    return own if own.is_file() else root() / relative


def lay_out(target: Path) -> list[Path]:
    """Copy everything into `target`; return the files. Raises RunError where one of them is already there and differs."""
    files = [path.relative_to(root()) for folder in FOLDERS for path in sorted((root() / folder).rglob("*")) if path.is_file()]
    for file in files:
        if (target / file).exists() and (target / file).read_bytes() != (root() / file).read_bytes():
            raise RunError(f"{target / file}: already there, and changed; nothing was written. Choose another folder or move it away")
    for file in files:
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root() / file, target / file)
    return files
