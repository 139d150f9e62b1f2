"""The Hugging Face hub -> this machine, and, on request, back. After `fetch`, only `push` needs a network, and nothing else asks for one.

Every failure is one line: what was asked for, why it did not come, where to go.
"""

import glob
import shutil
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mistral_dist import retry
from mistral_dist.config import Model, Recipe, Source
from mistral_dist.errors import DataError, ModelError
from mistral_dist.files import read_json
from mistral_dist.runtime import process

WANTED = ["*.json", "*.safetensors", "*.model", "tokenizer.model*", "*.txt", "*.jinja"]
"""Never *.bin or *.pt: pickles are not read."""
UNWANTED = ["consolidated*", "original/*"]
"""The same weights a second time, in Mistral's own layout."""


PATIENCE = 60.0
"""Waits of a download, in seconds. Shorter than retry.SECONDS: a person looks on, and `fetch` goes on where it was."""
STALL_SECONDS = 90.0
"""An attempt to begin a stream; the library retries within it."""


def endpoint() -> str:
    """The hub's address, which HF_ENDPOINT may change."""
    return process.environment("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def local_path(model: Model) -> Path:
    """The folder that holds the base. Raises ModelError, naming the command, where there is none on this machine."""
    if model.path is not None:
        path = Path(model.path).expanduser()
        if not (path / "config.json").is_file():
            raise ModelError(f"model.path: {path}: no model there (config.json is missing); set it to a model's folder")
        return path
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return _snapshot(model, local_files_only=True)
    except (LocalEntryNotFoundError, HFValidationError):
        remedy = "run `mistral-dist fetch RECIPE` once where there is a network, or set model.path to a copy"
        raise ModelError(f"model.name: {model.name} ({model.revision}) is not on this machine; {remedy}") from None


def earlier_adapter(recipe: Recipe) -> Path | None:
    """The folder of the adapter to begin with (`model.adapter`); None for a new one. Raises ModelError where it does not fit the recipe."""
    if recipe.model.adapter is None:
        return None
    given = Path(recipe.model.adapter).expanduser()
    folder = next((path for path in (given / "adapter", given) if (path / "adapter_model.safetensors").is_file()), None)
    if folder is None:
        raise ModelError(
            f"model.adapter: {given}: no adapter there (adapter_model.safetensors); give a finished run, or a folder of PEFT's"
        )
    theirs = read_json(folder / "adapter_config.json") or {}
    for what, saved, ours in (
        ("base_model_name_or_path", theirs.get("base_model_name_or_path"), recipe.model.name),
        ("lora.r", theirs.get("r"), recipe.lora.r),
        ("lora.lora_alpha", theirs.get("lora_alpha"), recipe.lora.lora_alpha),
        ("lora.use_rslora", theirs.get("use_rslora", False), recipe.lora.use_rslora),
    ):
        if saved != ours:
            raise ModelError(f"model.adapter: {folder}: {what} is {saved} there, the recipe says {ours}; make them the same")
    return folder


def load_tokenizer(model: Model) -> Any:
    """The base's tokenizer, from this machine."""
    import transformers

    path = local_path(model)
    try:
        # mistral_format: where mistral-common is installed, the library takes it for Mistral's tokenizers; adapters are
        # saved with the Hugging Face tokenizer, whatever they were trained with
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=model.trust_remote_code, mistral_format=False)
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: no usable tokenizer: {str(error).splitlines()[0]}") from error
    tokenizer.name_or_path = model.name
    return tokenizer


def fetch_model(model: Model) -> Path:
    """Download the base model and its tokenizer into the hub's cache; return the folder.

    A `model.path` is only checked. Raises ModelError with the model's URL and the remedy.
    """
    from huggingface_hub import errors

    if model.path is not None:
        return local_path(model)
    url = f"{endpoint()}/{model.name}"
    try:
        return _patience().attempt(lambda: _snapshot(model))
    except errors.GatedRepoError:
        raise ModelError(f"{url}: gated; accept its terms on that page, then {_log_in()}") from None
    except errors.RevisionNotFoundError:
        raise ModelError(f"{url}: has no revision {model.revision!r}; set model.revision") from None
    except errors.RepositoryNotFoundError:
        raise ModelError(f"{url}: no such model, or a private one; check model.name, or {_log_in()}") from None
    except errors.HFValidationError:
        raise ModelError(f"model.name: {model.name!r} is no name on the hub (owner/model); for a folder set model.path") from None
    except (OSError, errors.HTTPError) as error:
        if _is_refusal(error):
            raise ModelError(f"{url}: refused ({_first_line(error)}); {_log_in()}") from None
        raise ModelError(f"{url}: cannot be reached ({_first_line(error)}); {_without_network('model.path')}") from None


def is_name(name: str) -> bool:
    """Whether a repository could have it."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return all(name.split("/"))


def upload(folder: Path, name: str, files: Sequence[str], instead_of: Sequence[str]) -> str:
    """Put files of a folder into the repository `name`, a new one private, instead of what matches patterns there; return its URL.

    Raises ModelError with URL and remedy.
    """
    import huggingface_hub
    from huggingface_hub import errors

    url, hub = f"{endpoint()}/{name}", huggingface_hub.HfApi(endpoint=endpoint())
    try:
        hub.create_repo(name, private=True, exist_ok=True)
        hub.upload_folder(
            repo_id=name,
            folder_path=folder,
            allow_patterns=[glob.escape(file) for file in files],
            delete_patterns=list(instead_of),
            commit_message="Exported by mistral-dist",
        )
    except errors.HFValidationError:
        raise ModelError(f"{name}: is no name on the hub (owner/model)") from None
    except Exception as error:  # what carries large files has errors of its own
        if _is_refusal(error):
            raise ModelError(f"{url}: refused ({_first_line(error)}); {_log_in('write')}") from None
        raise ModelError(f"{url}: cannot be reached ({_first_line(error)}); the same command goes on with what is missing") from None
    return url


def _is_refusal(error: Exception) -> bool:
    """Whether the hub answered. The library wraps one in the other: what it answered, or that it did not answer, is the cause."""
    response = getattr(error.__cause__ or error, "response", None)
    return response is not None and response.status_code < 500


def _snapshot(model: Model, **options: Any) -> Path:
    """The base's files in the hub's cache; the same selection for fetching and for finding what was fetched."""
    import huggingface_hub

    options |= {"allow_patterns": WANTED, "ignore_patterns": UNWANTED}
    return Path(huggingface_hub.snapshot_download(model.name, revision=model.revision, **options))


def fetch_data(source: Source) -> None:
    """Download a data set into the cache of `datasets`, unless it is to be streamed. Raises DataError with URL and remedy."""
    if not source.streaming:
        load_data(source)


def load_data(source: Source) -> Any:
    """A data set of the hub, from the cache or downloaded; or a stream of it. Raises DataError with URL and remedy."""
    import datasets

    url = f"{endpoint()}/datasets/{source.name}"
    # a stream belongs to a long run, which a short outage need not end
    patience = retry.Patience() if source.streaming else _patience()

    def load() -> Any:
        return datasets.load_dataset(source.name, name=source.subset, split=source.split, streaming=source.streaming)

    try:
        return patience.attempt(lambda: retry.within(STALL_SECONDS, load) if source.streaming else load())
    except Exception as error:  # the library wraps the hub's errors in many of its own
        remedy = f"check data.sources.name and .split, or {_log_in()}; {_without_network('data.sources.path')}"
        raise DataError(f"{url}: cannot be had ({_first_line(error)}); {remedy}") from None


def _patience() -> retry.Patience:
    # a person waits for a download, and had better know at once that there is no network
    return retry.Patience(PATIENCE, worth=_may_heal, waits_only=True)


def _may_heal(error: BaseException) -> bool:
    return retry.is_transient(error) and not retry.is_unreachable(error)


def is_reachable() -> bool:
    """Whether the hub answers at all."""
    request = urllib.request.Request(endpoint(), method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=5):
            return True
    except urllib.error.HTTPError as error:
        return error.code < 500
    except OSError:
        return False


def free_bytes(folder: Path) -> int:
    """Free bytes on the disk of a folder, which need not exist yet."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _log_in(what: str = "read") -> str:
    import huggingface_hub

    if huggingface_hub.get_token() is None:
        return f"log in: no token on this machine (`hf auth login`, or HF_TOKEN from {endpoint()}/settings/tokens)"
    return f"use a token that may {what} it (`hf auth login`)"


def _without_network(setting: str) -> str:
    return f"without a network set {setting} to a copy, or copy ~/.cache/huggingface from a machine that has one"


def _first_line(error: BaseException) -> str:
    cause = error.__cause__ or error
    return (str(cause).strip().splitlines() or [type(cause).__name__])[0][:160]
