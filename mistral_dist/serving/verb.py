"""The checks that need no model, then the engine takes this process's place."""

import importlib.util
import ipaddress
import os
import shlex
import shutil
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mistral_dist.errors import MachineError, RecipeError
from mistral_dist.runtime import process
from mistral_dist.serving.engines import Engine, command
from mistral_dist.serving.served import Served, open_served

KEY = "VLLM_API_KEY"
"""The variable from which vLLM takes the key that a client must send; never a word of a command, which all users of a machine can see."""
EVERYWHERE = ("0.0.0.0", "::")
"""All of a machine's addresses."""
QUIET = {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}
"""What is served lies on this machine: the engine need not ask a hub, nor tell anyone."""
GUARD = Path(__file__).parent / "guard"
"""What vLLM imports, and nothing else of ours: its environment is another."""
BEFORE = "it stands before `--`, where it is checked"
OURS = {"host": BEFORE, "port": BEFORE, "api-key": f"set {KEY}", "uds": "leave it out"}
"""Of the engine's arguments, those that have a check or a secret; and what to do instead."""


@dataclass(frozen=True)
class Options:
    """How it is to be served."""

    engine: str = Engine.VLLM
    """vllm, transformers, or the path of their command."""
    host: str = "127.0.0.1"
    port: int = 8000
    base: Path | None = None
    """Where an adapter's base is, if not where it was in training."""
    engine_args: tuple[str, ...] = ()
    """The engine's own, behind ours, so that they win."""


def serve(places: Sequence[Path], options: Options, tell: Callable[[str], None], *, start: bool = True) -> None:
    """Become the engine, on one model or on several adapters of one base; `start=False` tells its command and returns.

    Raises UserError for all that can be seen before an engine is started.
    """
    engine = _engine(options.engine)
    _check_arguments(options.engine_args)
    _check_key(engine, options.host)
    models = [open_served(place, options.base) for place in places]
    key = engine is Engine.VLLM and bool(process.environment(KEY))
    words = [*command(engine, _executable(engine, options.engine), models, options.host, options.port, key=key), *options.engine_args]
    for line in (*_notes(models), f"$ {shlex.join(words)}"):
        tell(line)
    if start:
        _check_port(options.host, options.port)
        tell(_address(options.host, options.port))
        path = os.pathsep.join(filter(None, (str(GUARD), process.environment("PYTHONPATH"))))
        process.become(words, {"PYTHONPATH": path} if key else {}, **QUIET)


def _engine(named: str) -> Engine:
    try:
        return Engine(Path(named).name)
    except ValueError:
        raise RecipeError(f"--engine {named}: there are vllm and transformers, or the path of one of these commands") from None


def _executable(engine: Engine, named: str) -> str:
    """The engine's command: at the path that was given, beside this Python, or on the PATH."""
    beside = str(Path(sys.executable).with_name(engine.value))
    found = shutil.which(named) if named != engine else (shutil.which(beside) or shutil.which(engine.value))
    if found is None:
        remedy = "give its command's path: --engine /path/to/vllm (docs/serving.md says how to install it), or use --engine transformers"
        raise MachineError(f"--engine {named}: not found; {remedy}")
    if engine is Engine.TRANSFORMERS and found == beside:
        missing = [name for name in ("fastapi", "uvicorn", "openai") if importlib.util.find_spec(name) is None]
        if missing:
            raise MachineError(f'--engine transformers: {", ".join(missing)} not installed; run `pip install "transformers[serving]"`')
    return found


def _check_arguments(words: Sequence[str]) -> None:
    """Raise RecipeError for a word that is none of the engine's, or an argument that is an option of ours."""
    if words and not words[0].startswith("-"):
        raise RecipeError(f"{words[0]}: one model is served; another adapter of the same base with --also {words[0]}")
    for word in words:
        name = word.partition("=")[0].lstrip("-").replace("_", "-")
        ours = next((full for full in OURS if name and full.startswith(name)), None)  # engines take abbreviations
        if word.startswith("--") and ours is not None:
            raise RecipeError(f"--{name}: not as an engine's argument; {OURS[ours]}")


def _check_key(engine: Engine, host: str) -> None:
    """Raise RecipeError where whoever reaches this machine over a network could use the model."""
    if _is_loopback(host) or (engine is Engine.VLLM and process.environment(KEY)):
        return
    if engine is Engine.TRANSFORMERS:
        raise RecipeError(f"--host {host}: transformers knows no API key; leave it on 127.0.0.1 (behind a proxy that asks for one)")
    raise RecipeError(f"--host {host}: others could use the model without a key; `export {KEY}=$(openssl rand -hex 24)` first")


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _address(host: str, port: int) -> str:
    """Where clients find it; of all of a machine's addresses, its name."""
    if host in EVERYWHERE:
        host = socket.gethostname()
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"


def _check_port(host: str, port: int) -> None:
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise MachineError(f"{host}:{port}: cannot be listened on ({error.strerror}); choose another --port or --host") from None


def _notes(models: Sequence[Served]) -> list[str]:
    """What whoever serves it should know."""
    told = "is served on the base as published, not on the 4-bit one that it was trained on: `mistral-dist export` says how far that is off"
    return [f"{model.name}: {told}" for model in models if model.quantized]
