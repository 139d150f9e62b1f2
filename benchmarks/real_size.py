"""A Mistral-7B of real size, with random weights, loaded and trained on whatever machine this is.

    python benchmarks/real_size.py [--folder /tmp/real-size] [--keep]

Writes 14.5 GB of safetensors (vocabulary 32,768, as v0.3) and measures, each in a process of its own: the first load to
NF4, later ones from the cache, the same without a cache and by plain `from_pretrained` (--plain); then two ranks under
ZeRO-3 QLoRA, 2 steps of 256 tokens, a checkpoint, and a third step under ZeRO-2 on one; then its adapter is merged, into the base as
published and into what the 4-bit base means. Memory is sampled five times a second. Needs 36 GB of disk and, for the training, 20 GiB of
memory; some 20 minutes on 2 cores.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import save_file

SHAPES = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (1024, 4096),
    "self_attn.v_proj": (1024, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (14336, 4096),
    "mlp.up_proj": (14336, 4096),
    "mlp.down_proj": (4096, 14336),
}
LAYERS, HIDDEN, VOCABULARY = 32, 4096, 32768
TEXT = "the hinge of a knee is joined by four bands that hold it while it bends and turns under a load"
NEEDED = 36e9
"""Bytes of disk: the base, its quantized form, checkpoints, and a merged model."""
BARS = {"first load": 5.0, "later load": 10.0, "training": 20.0, "merge": 8.0}
"""GB of anonymous memory of a process, seconds, GiB of all processes together, GB again."""
LOAD = """
import json, sys, time
from mistral_dist.runtime.process import quiet_libraries
quiet_libraries()
import torch
from mistral_dist.base import load_base
from mistral_dist.config import Model
model = Model.model_validate_json(sys.argv[1])
started = time.perf_counter()
base = load_base(model, torch.device("cpu"), "sdpa")
print(json.dumps({"seconds": time.perf_counter() - started, "footprint": base.get_memory_footprint()}))
"""
PLAIN = LOAD.replace("load_base(model,", "plain(model,").replace(
    "started =",
    """
import transformers
from mistral_dist.base import _settings
def plain(model, device, attention):
    return transformers.AutoModelForCausalLM.from_pretrained(
        model.path, dtype=torch.bfloat16, quantization_config=_settings(torch.bfloat16), attn_implementation=attention)
started =""",
)


def make_base(folder: Path, layers: int, device: str = "cpu") -> Path:
    """Write the base, a layer at a time; its numbers are drawn on a device. Returns its folder."""
    target = folder / "mistral-7b-random"
    if (target / "config.json").is_file():
        return target
    target.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator(device).manual_seed(0)
    where: dict[str, str] = {}

    def draw(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(0, 0.02, generator=generator).cpu()

    def write(tensors: dict[str, torch.Tensor], number: int) -> None:
        name = f"model-{number:05d}-of-{layers + 1:05d}.safetensors"
        save_file(tensors, target / name, metadata={"format": "pt"})
        where.update(dict.fromkeys(tensors, name))

    ones = torch.ones(HIDDEN, dtype=torch.bfloat16)
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        tensors = {f"{prefix}{name}.weight": draw(*shape) for name, shape in SHAPES.items()}
        tensors |= {f"{prefix}{name}.weight": ones.clone() for name in ("input_layernorm", "post_attention_layernorm")}
        write(tensors, layer + 1)
    ends = {"model.embed_tokens.weight": draw(VOCABULARY, HIDDEN), "lm_head.weight": draw(VOCABULARY, HIDDEN)}
    write({**ends, "model.norm.weight": ones}, layers + 1)
    (target / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    _tokenizer(target)
    _config(target, layers)
    return target


def _tokenizer(target: Path) -> None:
    """Words of the text below, and as many others as the vocabulary has."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", *dict.fromkeys(TEXT.split())]
    words += [f"token{number}" for number in range(len(words), VOCABULARY)]
    inner = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>").save_pretrained(target)


def _config(target: Path, layers: int) -> None:
    from transformers import MistralConfig

    config = MistralConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, num_hidden_layers=layers, max_position_embeddings=32768, sliding_window=None,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6}, architectures=["MistralForCausalLM"], dtype="bfloat16",
    )  # fmt: skip
    config.save_pretrained(target)


def make_recipe(folder: Path, base: Path, *, length: int = 256, rows: int = 40, words: int = 400, steps: int = 3, packs: int = 2) -> Path:
    """So many steps of so many packs of `length` tokens, from rows of plain text of so many words."""
    text = TEXT.split()
    bodies = [" ".join(text[(n * 7 + k * (1 + n % 5)) % len(text)] for k in range(words)) for n in range(rows)]
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": f"{n} {body}"}) + "\n" for n, body in enumerate(bodies)))
    recipe = {
        "version": 1,
        "task": {"kind": "pretrain"},
        "data": {
            "sources": [{"path": str(folder / "texts.jsonl")}],
            "dir": str(folder / "data"),
            "max_length": length,
            "near_duplicates": None,
        },
        "model": {"name": "benchmark/mistral-7b-random", "path": str(base)},
        "train": {"steps": steps, "global_batch_size": packs},
        "checkpoint": {"save_steps": 2, "save_total_limit": 1},
        "run": {"dir": str(folder / "run")},
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    return folder / "recipe.yaml"


class Watch:
    """The memory of a process and all its children, sampled; peaks in bytes."""

    def __init__(self, pid: int) -> None:
        self.anonymous = self.resident = self.together = 0
        """The largest process's anonymous and whole resident set; all processes' proportional sets together."""
        self._pid = pid
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Stop sampling."""
        self._ended.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._ended.wait(0.2):
            try:
                root = psutil.Process(self._pid)
                found = [_memory(process.pid) for process in [root, *root.children(recursive=True)]]
            except psutil.NoSuchProcess:
                return
            self.anonymous = max([self.anonymous, *(memory["Anonymous"] for memory in found)])
            self.resident = max([self.resident, *(memory["Rss"] for memory in found)])
            self.together = max(self.together, sum(memory["Pss"] for memory in found))


def _memory(pid: int) -> dict[str, int]:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    except (OSError, ProcessLookupError):
        lines = []
    found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    return {name: found.get(name, 0) for name in ("Anonymous", "Rss", "Pss")}


def measure(command: list[str], **environment: str) -> tuple[Watch, float, str]:
    """Run a command to its end; its memory, seconds and output. Raises SystemExit where it fails."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment})
    watch = Watch(process.pid)
    out, err = process.communicate()
    watch.end()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)[:200]}\n{out}\n{err}")
    return watch, time.perf_counter() - started, out


def load(what: str, code: str, model: str, **environment: str) -> dict[str, float]:
    """One load in a process of its own; a line of the table."""
    watch, _, out = measure([sys.executable, "-c", code, model], **environment)
    result = json.loads(out.splitlines()[-1])
    result |= {"anonymous": watch.anonymous / 1e9, "resident": watch.resident / 1e9}
    print(
        f"{what:<34}{result['seconds']:>8.1f} s   {result['anonymous']:>6.2f} GB anonymous, {result['resident']:>6.2f} GB resident"
        f"   (model {result['footprint'] / 1e9:.2f} GB)",
        flush=True,
    )
    return result


def train(what: str, recipe: Path, *words: str, stop: bool = False) -> float:
    """One training, to its end or stopped in its second step; a line of the table. Returns the peak of all processes, in GiB."""
    run = Path(json.loads(recipe.read_text())["run"]["dir"])
    metrics = run / "metrics.jsonl"
    started = time.perf_counter()
    with open(recipe.with_suffix(".log"), "a") as log:
        process = subprocess.Popen([sys.executable, "-m", "mistral_dist.cli", "train", str(recipe), *words], stdout=log, stderr=log)
    watch = Watch(process.pid)
    while stop and process.poll() is None:
        if metrics.is_file() and metrics.read_text().count("\n"):
            process.send_signal(signal.SIGTERM)
            stop = False
        time.sleep(0.5)
    code = process.wait()
    watch.end()
    if code not in (0, 85):
        raise SystemExit(f"exit code {code}; see {log.name} and {run}/log.txt")
    steps = [entry for line in metrics.read_text().splitlines() if "eval" not in (entry := json.loads(line))]
    told = ", ".join(f"{entry['step']}: loss {entry['loss']:.3f}, {entry['seconds']:.0f} s" for entry in steps)
    print(
        f"{what:<34}{time.perf_counter() - started:>8.1f} s   {watch.together / 2**30:>6.2f} GiB together,"
        f" {watch.anonymous / 1e9:.2f} GB anonymous at most in one   (steps {told})",
        flush=True,
    )
    return watch.together / 2**30


def measure_loads(model: str, cache: Path, *, plain: bool) -> dict[str, bool]:
    """The loads; which bars were met."""
    os.environ["OMP_NUM_THREADS"] = str(os.cpu_count())
    if plain:
        load("plain from_pretrained", PLAIN, model)
    uncached = load("first load, cache off", LOAD, model, MISTRAL_DIST_CACHE="off")
    shutil.rmtree(cache, ignore_errors=True)
    first = load("first load, building the cache", LOAD, model)
    later = [load("later load, from the cache", LOAD, model) for _ in range(2)]
    return {
        "first load": max(first["anonymous"], uncached["anonymous"]) <= BARS["first load"],
        "later load": max(one["seconds"] for one in later) <= BARS["later load"],
    }


def merge(run: Path, form: str) -> float:
    """One merge; a line of the table. Returns its peak of anonymous memory, in GB."""
    out = run.parent / form
    command = [sys.executable, "-m", "mistral_dist.cli", "export", str(run), str(out), "--form", form, "--no-compare"]
    watch, seconds, _ = measure(command)
    size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    shutil.rmtree(out)
    what = f"{watch.anonymous / 1e9:>6.2f} GB anonymous, {watch.resident / 1e9:.2f} GB resident"
    print(f"{f'merge, {form}':<34}{seconds:>8.1f} s   {what}   ({size / 1e9:.2f} GB written)", flush=True)
    return watch.anonymous / 1e9


def main() -> None:
    """Print the table; fail where a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/mistral-dist-real-size"))
    parser.add_argument("--keep", action="store_true", help="leave the files")
    parser.add_argument("--plain", action="store_true", help="also measure from_pretrained")
    parser.add_argument("--only", choices=["make", "load", "train"], help="one part")
    parser.add_argument("--layers", type=int, default=LAYERS, help="fewer: a trial, of which the bars say nothing")
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(asked.folder).free
    need = NEEDED - sum(file.stat().st_size for file in asked.folder.rglob("*") if file.is_file())
    if free < need:
        raise SystemExit(f"{asked.folder}: {free / 1e9:.0f} GB free, {need / 1e9:.0f} GB are needed; set --folder")
    os.environ["MISTRAL_DIST_CACHE"] = str(asked.folder / "cache")
    met: dict[str, Any] = {}
    try:
        started = time.perf_counter()
        base = make_base(asked.folder, asked.layers)
        print(f"{'writing the base':<34}{time.perf_counter() - started:>8.1f} s", flush=True)
        recipe = make_recipe(asked.folder, base)
        if asked.only in (None, "load"):
            model = json.dumps({"name": "benchmark/mistral-7b-random", "path": str(base)})
            met |= measure_loads(model, asked.folder / "cache", plain=asked.plain)
        if asked.only in (None, "train"):
            os.environ.pop("OMP_NUM_THREADS", None)
            shutil.rmtree(asked.folder / "run", ignore_errors=True)
            peak = train("ZeRO-3 x 2, 2 steps", recipe, "--processes", "2", "--zero", "3", stop=True)
            met["training"] = peak <= BARS["training"]
            train("resumed, ZeRO-2 x 1, 1 step", recipe, "--processes", "1", "--zero", "2")
            met["merge"] = max(merge(asked.folder / "run", form) for form in ("merged-bf16", "merged-nf4")) <= BARS["merge"]
    finally:
        if not asked.keep:
            shutil.rmtree(asked.folder)
    missed = [name for name, is_met in met.items() if not is_met]
    if missed:
        raise SystemExit(f"missed: {', '.join(missed)}")


if __name__ == "__main__":
    main()
