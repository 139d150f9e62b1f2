"""An exported folder -> a repository on the hub: what was exported, whole, and nothing that came into the folder since."""

from collections.abc import Callable
from pathlib import Path

from mistral_dist import hub
from mistral_dist.errors import CheckpointError, ModelError, RunError
from mistral_dist.export.forms import FACTS, SUMS, sums_of
from mistral_dist.files import sha256

OURS = (
    *("README.md", FACTS, SUMS, "config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "chat_template*"),
    *("tekken.json", "model*.safetensors", "model.safetensors.index.json", "adapter_config.json", "adapter_model.safetensors"),
)
"""What an export may hold. Of an earlier one in the same repository, what is not among the new files is taken out: a loader that found
an adapter beside a merged model would load the adapter."""


def push(folder: Path, name: str, tell: Callable[[str], None], *, upload: bool) -> None:
    """Tell what would go to the hub's repository `name` (owner/model); with `upload`, put it there.

    Raises RunError where no export lies there, CheckpointError for a file that is not as it was exported, ModelError where the hub refuses.
    """
    sums = sums_of(folder)
    if sums is None:
        raise RunError(f"{folder}: no exported folder ({SUMS} is missing); `mistral-dist export RUN {folder}` makes one")
    if name.count("/") != 1 or not hub.is_name(name):
        raise ModelError(f"{name}: is no name on the hub; give owner and model, as in me/{folder.resolve().name}")
    for file, digest in sums.items():
        if not (folder / file).is_file() or sha256(folder / file) != digest:
            raise CheckpointError(f"{folder / file}: not as it was exported ({SUMS}); export the run again")
    files = [*sums, SUMS]
    for file in files:
        tell(f"{(folder / file).stat().st_size:>16,}  {file}")
    tell("files of an earlier export that are none of these are taken out of the repository, others stay")
    tell("whoever sees the repository can read README.md and export.json: the recipe, with its prompts and with paths of this machine")
    if upload:
        tell(f"{hub.upload(folder, name, files, instead_of=OURS)}: {len(files)} files")
    else:
        tell(f"{hub.endpoint()}/{name}: nothing was sent; --upload sends these {len(files)} files, to a private repository if it is new")
