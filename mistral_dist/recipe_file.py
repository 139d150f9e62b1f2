"""A recipe's file: YAML whose keys have lines, overrides, and mistakes explained in one line.

The tree itself is config.py's; here is how it is read, and what is said to someone who wrote it wrongly.
"""

import difflib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from mistral_dist.errors import RecipeError


class _Loader(yaml.SafeLoader):
    """PyYAML speaks YAML 1.1, where `2e-4` is a string and a repeated key silently wins; neither is wanted."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a word", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key.value!r} is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d[\d_]*)(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789"))


def read_yaml(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """The file's tree, and the line of each dotted key."""
    if not path.is_file():
        what = "is a folder, not a recipe" if path.is_dir() else "no such recipe"
        raise RecipeError(f"{path}: {what}; `mistral-dist init DIR` lays out commented ones")
    try:
        text = path.read_text(encoding="utf-8")
        tree = yaml.load(text, _Loader)
        node = yaml.compose(text, _Loader)
        lines = dict(_key_lines(node))
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from None
    except RecursionError:
        raise RecipeError(f"{path}: not a recipe: a section holds itself (an alias inside its own anchor)") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}" if mark else str(path)
        reason = getattr(error, "problem", None) or " ".join(str(error).split())
        tab = "; indent with blanks, not tabs" if "\\t" in reason else ""
        raise RecipeError(f"{place}: not valid YAML: {reason}{tab}") from None
    if not isinstance(tree, dict):
        found = "empty" if tree is None else f"a {type(tree).__name__}"
        raise RecipeError(f"{path}: a recipe is a mapping of sections (version, task, data, model, ...), this is {found}")
    return tree, lines


def _key_lines(node: yaml.Node | None, prefix: str = "") -> Iterator[tuple[str, int]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            dotted = f"{prefix}{key.value}"
            yield dotted, key.start_mark.line + 1
            yield from _key_lines(value, f"{dotted}.")
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield f"{prefix}{index}", value.start_mark.line + 1
            yield from _key_lines(value, f"{prefix}{index}.")


def parse_override(word: str) -> tuple[str, Any]:
    """`section.field=value` as (dotted key, value), the value read as YAML. Raises RecipeError."""
    key, equals, value = word.partition("=")
    if not equals or not re.fullmatch(r"\w+(\.\w+)+", key):
        raise RecipeError(f"{word!r}: an override looks like section.field=value, e.g. optim.learning_rate=1e-4")
    try:
        return key, yaml.load(value, _Loader)
    except yaml.YAMLError:
        raise RecipeError(f"{word!r}: the value is not valid YAML; quote it, e.g. '{key}=\"...\"'") from None


def set_field(tree: dict[str, Any], key: str, value: Any) -> None:
    """Put a value into a tree under a dotted key; sections that are missing are made. Raises RecipeError."""
    *sections, field = key.split(".")
    for depth, name in enumerate(sections):
        if isinstance(tree, list) and name.isdigit() and int(name) < len(tree):
            tree = tree[int(name)]
            continue
        if not isinstance(tree, dict):
            raise RecipeError(f"override {key}: {'.'.join(sections[:depth])} is not a section")
        tree = tree.setdefault(name, {})
    if not isinstance(tree, dict):
        raise RecipeError(f"override {key}: {'.'.join(sections)} is not a section")
    tree[field] = value


ELSEWHERE = {
    # Trainer / TRL
    "per_device_train_batch_size": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size (accumulation follows from it)",
    "num_train_epochs": "train.epochs",
    "max_steps": "train.steps",
    "max_seq_length": "data.max_length",
    "output_dir": "run.dir",
    "logging_dir": "run.dir",
    "lr": "optim.learning_rate",
    "warmup_steps": "optim.warmup_ratio (a share of all steps)",
    "bf16": "model.dtype: bfloat16",
    "fp16": "model.dtype: bfloat16 (float16 is not supported)",
    "tf32": "model.dtype",
    "load_in_4bit": "model.quantization: nf4",
    "attn_implementation": "model.attention",
    "model_name_or_path": "model.name",
    "model_id": "model.name",
    "dataset_name": "data.sources",
    "max_grad_norm": "optim.max_grad_norm",
    "label_smoothing": "train.label_smoothing_factor",
    "class_weight": "task.class_weights",
    "optim": "optim (a section; the optimizer is AdamW)",
    "do_eval": "train.eval_steps",
    "eval_strategy": "train.eval_steps (the steps from one validation to the next)",
    "evaluation_strategy": "train.eval_steps (the steps from one validation to the next)",
    "metric_for_best_model": "nothing: the loss on the validation examples decides",
    "greater_is_better": "nothing: the loss on the validation examples decides",
    "per_device_eval_batch_size": "nothing: a forward of a validation takes one pack",
    # axolotl
    "base_model": "model.name",
    "revision_of_model": "model.revision",
    "datasets": "data.sources",
    "dataset_prepared_path": "data.dir",
    "val_set_size": "data.validation_fraction",
    "sequence_len": "data.max_length",
    "sample_packing": "nothing: packing is always on, and exact",
    "micro_batch_size": "train.micro_batch_size",
    "num_epochs": "train.epochs",
    "evals_per_epoch": "train.eval_steps (the steps from one validation to the next)",
    "adapter": "model.quantization: nf4 (QLoRA) or none (LoRA)",
    "lora_r": "lora.r",
    "lora_alpha": "lora.lora_alpha",
    "lora_dropout": "lora.lora_dropout",
    "lora_target_modules": "lora.target_modules",
    "lora_target_linear": "lora.target_modules: all-linear",
    "lora_modules_to_save": "lora.modules_to_save",
    "peft_use_rslora": "lora.use_rslora",
    "peft_use_dora": "nothing: DoRA is not supported (under ZeRO-3 it would read weights that are not there)",
    "peft_init_lora_weights": "lora.init_lora_weights (PiSSA and LoftQ, which change the base, are not supported)",
    "lr_scheduler": "optim.lr_scheduler_type",
    "flash_attention": "model.attention: flash_attention_2",
    "xformers_attention": "model.attention",
    # LLaMA-Factory
    "stage": "task.kind",
    "finetuning_type": "model.quantization: nf4 (QLoRA) or none (LoRA)",
    "template": "nothing: the tokenizer's own chat template is used",
    "dataset": "data.sources",
    "cutoff_len": "data.max_length",
    "lora_rank": "lora.r",
    "lora_target": "lora.target_modules",
    "additional_target": "lora.modules_to_save",
    "quantization_bit": "model.quantization: nf4",
    "val_size": "data.validation_fraction",
    "early_stopping_steps": "train.early_stopping_patience",
    "packing": "nothing: packing is always on, and exact",
    "flash_attn": "model.attention",
    # PEFT
    "use_dora": "nothing: DoRA is not supported (under ZeRO-3 it would read weights that are not there)",
    "loftq_config": "nothing: LoftQ is not supported (it changes the base, so the adapter alone would not be the result)",
    "use_pissa": "nothing: PiSSA is not supported (it changes the base, so the adapter alone would not be the result)",
    # ours, often guessed
    "alpha": "lora.lora_alpha",
    "batch_size": "train.global_batch_size",
    "epochs": "train.epochs",
    "scheduler": "optim.lr_scheduler_type",
    "max_len": "data.max_length",
    "output": "run.dir",
}
"""Names that other trainers give to what has a place here."""


def did_you_mean(key: str, known: list[str]) -> str:
    """The remedy for an unknown dotted key, of the `known` ones the most likely meant."""
    name = key.split(".")[-1]
    if name in ELSEWHERE and ELSEWHERE[name].split(" ")[0].rstrip(":") != key:
        return f"here it is {ELSEWHERE[name]}"
    same_name = [field for field in known if field.split(".")[-1] == name and "sources" not in field]
    close = same_name or difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]}?"
    section = key.rsplit(".", 1)[0]
    siblings = [field.rsplit(".", 1)[1] for field in known if field.startswith(f"{section}.") and field.count(".") == 1]
    return f"known here: {', '.join(siblings or [field for field in known if '.' not in field])}"


def explain(error: ValidationError, path: Path, lines: Mapping[str, int], overrides: Mapping[str, Any], known: list[str]) -> str:
    """One line for the first problem that pydantic found, and how many more there are."""
    problems = error.errors(include_url=False)
    first = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    parts = [str(part) for part in first["loc"]]
    # pydantic names the branch of a union or a tag after the field; only what the user wrote is shown
    while len(parts) > 2 and ".".join(parts) not in lines and ("[" in parts[-1] or "'" in parts[-1]):
        parts.pop()
    parts = [part for part in parts if not part.startswith("dict[")]
    key = ".".join(parts)
    line = next((lines[k] for k in (".".join(parts[:n]) for n in range(len(parts), 0, -1)) if k in lines), None)
    is_typed = any(key == typed or key.startswith(f"{typed}.") for typed in overrides)
    place = "override" if is_typed else f"{path}:{line}" if line else str(path)
    # one mistake often makes several problems in its section; other sections' are others
    others = len({p["loc"][:1] for p in problems} - {first["loc"][:1]})
    more = f" (and {others} more section{'s have' if others > 1 else ' has'} a problem)" if others else ""
    return f"{place}: {_problem(first, key, known)}{more}"


def _problem(problem: Any, key: str, known: list[str]) -> str:
    kind, value = problem["type"], problem.get("input")
    if kind == "extra_forbidden":
        return f"{key}: no such field; {did_you_mean(key, known)}"
    if kind == "missing":
        return f"{key}: this field is required; add it"
    if kind == "value_error":
        text = str(problem["ctx"]["error"])
        if not key:
            return text  # of the whole recipe: the text names the field
        return f"{key}.{text}" if re.match(r"[\w.]+: ", text) else f"{key}: {text}"
    if kind.startswith("model_") and isinstance(value, str) and re.match(r"data\.(sources|benchmarks)\.", key):
        return f"{key}: is a section of its own; write {{path: {value}}}"
    expected = EXPECTED.get(kind) or problem["msg"][0].lower() + problem["msg"][1:]
    quote = f'; quote it: "{value}"' if kind == "string_type" and isinstance(value, (bool, int, float)) else ""
    return f"{key}: {expected}, but it is {value!r}{quote}"


EXPECTED = {
    "tuple_type": "must be a list",
    "too_short": "must have an entry",
    "model_type": "must be a section of its own (key: value)",
    "model_attributes_type": "must be a section of its own (key: value)",
    "dict_type": "must be a mapping (key: value)",
}
"""pydantic's words for these speak of Python."""
