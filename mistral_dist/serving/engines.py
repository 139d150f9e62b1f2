"""The engines, each as the command line that serves a model. Pure: nothing is looked up, nothing started. As of vLLM 0.32."""

import json
from collections.abc import Sequence
from enum import StrEnum

from mistral_dist.errors import ModelError, RecipeError
from mistral_dist.serving.served import Served

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Of vLLM's --max-lora-rank."""
GREEDY = json.dumps({"temperature": 0.0})
"""What a request that says nothing gets: the answer that evaluation measured. vLLM's own default is a temperature of 1."""
GUARD = "mistral_dist_guard.RequireKey"
"""The class, of serving/guard, that asks for the key wherever vLLM itself does not."""
PATIENCE_SECONDS = 20
"""For answers that are being written when the server is stopped; SLURM kills after 30."""


class Engine(StrEnum):
    """Whose server it is."""

    VLLM = "vllm"
    TRANSFORMERS = "transformers"


def command(engine: Engine, executable: str, models: Sequence[Served], host: str, port: int, *, key: bool = False) -> list[str]:
    """The words that start an engine on some models; `key`: whether clients must send one.

    Raises RecipeError, ModelError for what it cannot serve.
    """
    if engine is Engine.TRANSFORMERS:
        return _transformers(executable, models, host, port)
    return [*_vllm(executable, models, host, port), *(["--middleware", GUARD] if key else [])]


def _vllm(executable: str, models: Sequence[Served], host: str, port: int) -> list[str]:
    """`vllm serve`: one whole model, or a base with any number of its adapters, each under its name."""
    first, adapters = models[0], [model for model in models if model.adapter is not None]
    _check_together(models)
    words = [executable, "serve", str(first.weights), "--served-model-name", first.weights_name, "--host", host, "--port", str(port)]
    # the base's own defaults (a penalty, a temperature) are not those of the evaluation; Mistral's second copy of the weights is not read
    words += ["--dtype", first.dtype, "--config-format", "hf", "--generation-config", "vllm", "--override-generation-config", GREEDY]
    words += ["--tokenizer-mode", "mistral" if first.mistral_common else "hf", "--shutdown-timeout", str(PATIENCE_SECONDS)]
    if first.tools:  # without tokens for them vLLM would not start
        words += ["--enable-auto-tool-choice", "--tool-call-parser", "mistral"]
    if first.trust_remote_code:
        words += ["--trust-remote-code"]
    if adapters:
        words += ["--enable-lora", "--max-loras", str(len(adapters)), "--max-lora-rank", str(_rank(adapters)), "--lora-modules"]
        words += [json.dumps({"name": model.name, "path": str(model.adapter), "base_model_name": model.weights_name}) for model in adapters]
    return words


def _transformers(executable: str, models: Sequence[Served], host: str, port: int) -> list[str]:
    """`transformers serve`: one whole model; a client calls it by the path that is written here."""
    first = models[0]
    if len(models) > 1:
        raise RecipeError(f"--also {models[1].name}: transformers serves one model; use --engine vllm")
    if first.adapter is not None:
        raise ModelError(f"{first.name}: is an adapter, and transformers serves whole models; export it with --form merged-nf4")
    if first.mistral_common:
        raise ModelError(f"{first.name}: mistral-common encoded its conversations, which transformers would not use; use --engine vllm")
    words = [executable, "serve", str(first.weights), "--host", host, "--port", str(port), "--dtype", first.dtype]
    return [*words, *(["--trust-remote-code"] if first.trust_remote_code else [])]


def _check_together(models: Sequence[Served]) -> None:
    first, names = models[0], {models[0].weights_name}
    for model in models:
        if len(models) > 1 and model.adapter is None:
            raise RecipeError(f"{model.name}: is a whole model; only adapters of one base are served together (--form adapter)")
        if (model.weights, model.dtype, model.mistral_common) != (first.weights, first.dtype, first.mistral_common):
            raise RecipeError(f"{model.name}: another base, dtype or tokenizer than {first.name}'s; serve it by a command of its own")
        if model.adapter is not None and model.name in names:
            raise RecipeError(f"{model.name}: two models would have that name; rename one's folder")
        names.add(model.name)


def _rank(adapters: Sequence[Served]) -> int:
    largest = max(model.rank for model in adapters)
    fitting = next((rank for rank in RANKS if rank >= largest), None)
    if fitting is None:
        raise ModelError(f"lora.r={largest}: vLLM loads adapters up to {RANKS[-1]}; export it with --form merged-nf4")
    return fitting
