"""The recipe: what is refused, with which words, and that it survives being written and read."""

from collections.abc import Callable
from pathlib import Path

import pytest

from mistral_dist.config import FREE_IN_A_RUN, Recipe, changed_fields, known_fields, leaves
from mistral_dist.errors import RecipeError
from mistral_dist.recipe_file import ELSEWHERE, did_you_mean

GOOD = """
version: 1
task: {kind: classification, labels: [a, b]}
data:
  sources:
    - path: x.jsonl
model:
  name: org/model
optim:
  learning_rate: 2e-4
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        path = tmp_path / "r.yaml"
        path.write_text(text)
        return path

    return write


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        Recipe.load(path, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_yaml_1_1_exponents_are_numbers(recipe: Callable[[str], Path]) -> None:
    assert Recipe.load(recipe(GOOD)).optim.learning_rate == 2e-4


def test_an_override_wins_and_is_typed(recipe: Callable[[str], Path]) -> None:
    loaded = Recipe.load(recipe(GOOD), ["optim.learning_rate=1e-5", "task.labels=[x, y, z]", "data.sources.0.path=y.csv", "train.steps=7"])
    assert (loaded.optim.learning_rate, loaded.task.labels, loaded.train.steps) == (1e-5, ("x", "y", "z"), 7)
    assert loaded.data.sources[0].path == "y.csv"


def test_what_is_dumped_is_read_back_equal(recipe: Callable[[str], Path], tmp_path: Path) -> None:
    loaded = Recipe.load(recipe(GOOD), ["data.sources.0.columns={text: body}"])
    (tmp_path / "again.yaml").write_text(loaded.dump())
    assert Recipe.load(tmp_path / "again.yaml") == loaded


def test_places_default_to_the_name_of_the_recipe(recipe: Callable[[str], Path]) -> None:
    loaded = Recipe.load(recipe(GOOD))
    assert (str(loaded.run_dir), str(loaded.data_dir)) == ("runs/r", "data/r")


def test_a_recipe_is_frozen(recipe: Callable[[str], Path]) -> None:
    with pytest.raises(ValueError, match="frozen"):
        Recipe.load(recipe(GOOD)).train.seed = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (
            "learning_rate: 2e-4",
            "learning_rat: 2e-4",
            ["r.yaml:10", "optim.learning_rat", "no such field", "did you mean optim.learning_rate?"],
        ),
        ("learning_rate: 2e-4", "learning_rate: fast", ["r.yaml:10", "optim.learning_rate", "valid number", "'fast'"]),
        ("learning_rate: 2e-4", "learning_rate: -1", ["r.yaml:10", "optim.learning_rate", "greater than 0", "-1"]),
        ("learning_rate: 2e-4", "learning_rate: 1\n  learning_rate: 2", ["r.yaml:11", "given twice"]),
        ("name: org/model", "nam: org/model", ["r.yaml:8", "model.nam", "did you mean model.name?"]),
        ("model:", "modle:", ["r.yaml:7", "modle", "did you mean model?"]),
        ("labels: [a, b]", "labels: [a]", ["r.yaml:3", "task.labels", "two or more"]),
        ("kind: classification", "kind: classify", ["r.yaml:3", "task.kind", "'classification'", "'classify'"]),
        ("kind: classification", "kind: chat", ["r.yaml:3", "task.labels", "remove them"]),
        ("- path: x.jsonl", "- {}", ["r.yaml:6", "data.sources.0: give either path", "or name"]),
        ("version: 1", "version: 2", ["r.yaml:2", "version", "input should be 1", "2"]),
        ("version: 1\n", "", ["r.yaml", "version", "required"]),
        ("labels: [a, b]", "labels: [yes, b]", ["r.yaml:3", "task.labels.0", 'quote it: "True"']),
        ("optim:\n  learning_rate: 2e-4", "optim: [1]", ["r.yaml:9", "optim: must be a section of its own"]),
        ("learning_rate: 2e-4", "learning_rate: .inf", ["r.yaml:10", "finite number"]),
        ("name: org/model", "? [a]\n  : b", ["r.yaml:8", "a key must be a word"]),
        ("sources:", "source:", ["r.yaml:5", "did you mean data.sources?"]),
        ("name: org/model", "name: [", ["r.yaml:", "not valid YAML"]),
    ],
)
def test_a_mistake_is_one_line_with_place_and_remedy(recipe: Callable[[str], Path], old: str, new: str, words: list[str]) -> None:
    assert old in GOOD
    message = refusal(recipe(GOOD.replace(old, new, 1)))
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optim.learning_rate", ["looks like section.field=value"]),
        ("lr=1", ["looks like section.field=value"]),
        ("optim.lr=1", ["override: optim.lr", "here it is optim.learning_rate"]),
        ("train.steps=many", ["override: train.steps", "valid integer", "'many'"]),
        ("version.x=1", ["override version.x", "not a section"]),
        ("train.steps=[", ["not valid YAML"]),
        ("data.streaming=true", ["train.steps: a stream has no epochs"]),
        ("data.sources.0.format=alpaca", ["data.sources.0.format: alpaca does not fit task.kind=", "text_label"]),
        ("data.sources.0.subset=en", ["data.sources.0", "subset and streaming are a hub data set's"]),
        ("data.benchmarks=[{path: b.jsonl, weight: 2}]", ["data.benchmarks.0: is only compared with"]),
        ("data.benchmarks=[b.jsonl]", ["override: data.benchmarks.0", "write {path: b.jsonl}"]),
        ("data.sources=[]", ["override: data.sources: must have an entry"]),
        ("task.class_weights=balancd", ["override: task.class_weights: must be balanced or a weight for each label", "'balancd'"]),
        ("task.class_weights={c: 2}", ["task.class_weights: 'c' is none of task.labels (a, b)"]),
        ("task.class_weights={a: 0}", ["override: task.class_weights.a: input should be greater than 0, but it is 0"]),
        ("train.label_smoothing=0.1", ["override: train.label_smoothing", "here it is train.label_smoothing_factor"]),
        ("train.label_smoothing_factor=1", ["train.label_smoothing_factor: input should be less than 1"]),
        ("model.attention=flex_attention", ["override: model.attention: input should be 'auto'", "'sdpa' or 'eager'", "flex_attention"]),
        ("lora.target_modules=.*_proj", ["must be all-linear or a list of names", "'.*_proj' (patterns are not supported)"]),
        ("lora.use_dora=true", ["override: lora.use_dora: no such field", "DoRA is not supported"]),
        ("lora.loftq_config={}", ["override: lora.loftq_config: no such field", "LoftQ is not supported"]),
        ("lora.init_lora_weights=pissa", ["override: lora.init_lora_weights: input should be a valid boolean", "'pissa'"]),
        ("data.benchmarks=[{pth: b.jsonl}]", ["data.benchmarks.0.pth: no such field", "data.benchmarks.0.path"]),
    ],
)
def test_a_wrong_override_says_so(recipe: Callable[[str], Path], override: str, words: list[str]) -> None:
    message = refusal(recipe(GOOD), override)
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["data.streaming=true", "train.steps=3", "task.class_weights=balanced"],
            ["task.class_weights: balanced needs the number of examples", "task.class_weights={spam: 3.0}", "data.streaming=false"],
        ),
        (["task.kind=pretrain", "task.labels=[]", "task.class_weights={a: 2}"], ["task.class_weights: only task.kind=classification"]),
        (
            ["lora.target_modules=[q_proj, lm_head]", "lora.modules_to_save=[lm_head]"],
            ["lora.modules_to_save: lm_head is in target_modules"],
        ),
        (["train.early_stopping_patience=3"], ["train.early_stopping_patience: needs", "train.eval_steps=50"]),
        (["train.load_best_model_at_end=true"], ["train.load_best_model_at_end: needs", "train.eval_steps=50"]),
        (
            ["train.eval_steps=5", "train.early_stopping_threshold=0.1"],
            ["train.early_stopping_threshold: says nothing without train.early_stopping_patience"],
        ),
        (
            ["train.eval_steps=5", "data.validation_fraction=0"],
            [
                "train.eval_steps: there are no validation examples",
                "data.validation_fraction=0",
                "into: validation",
                "remove train.eval_steps",
            ],
        ),
        (
            ["train.eval_steps=5", "data.streaming=true", "train.steps=9"],
            ["train.eval_steps: there are no validation examples: a stream", "into: validation", "remove train.eval_steps"],
        ),
    ],
)
def test_what_does_not_go_together_says_so(recipe: Callable[[str], Path], overrides: list[str], words: list[str]) -> None:
    message = refusal(recipe(GOOD), *overrides)
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "this is empty"),
        (b"- a\n- b\n", "this is a list"),
        (b"version: 1\ntask: &t {x: *t}\n", "a section holds itself"),
        (b"version: \xff\n", "not UTF-8"),
        (b"version: 1\x00\n", "not valid YAML"),
        (b"task:\n\tkind: chat\n", "indent with blanks, not tabs"),
    ],
)
def test_a_file_that_is_no_recipe_says_why(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "r.yaml").write_bytes(content)
    assert words in refusal(tmp_path / "r.yaml")


def test_a_missing_recipe_names_the_way_to_one(tmp_path: Path) -> None:
    assert "mistral-dist init" in refusal(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("key", "remedy"),
    [
        ("train.per_device_train_batch_size", "train.micro_batch_size"),
        ("lora.lora_rank", "lora.r"),
        ("sequence_len", "data.max_length"),
        ("data.cutoff_len", "data.max_length"),
        ("train.gradient_accumulation_steps", "train.global_batch_size"),
        ("model.gradient_checkpointing", "train.gradient_checkpointing"),
        ("train.eval_strategy", "train.eval_steps"),
        ("evals_per_epoch", "train.eval_steps"),
        ("train.early_stopping_steps", "train.early_stopping_patience"),
        ("checkpoint.load_best_model_at_end", "train.load_best_model_at_end"),
        ("train.metric_for_best_model", "the loss on the validation examples decides"),
    ],
)
def test_names_of_other_trainers_are_known(key: str, remedy: str) -> None:
    assert remedy in did_you_mean(key, known_fields())


def test_every_name_from_elsewhere_leads_to_a_field_that_exists(recipe: Callable[[str], Path]) -> None:
    known = {key for key, _ in leaves(Recipe.load(recipe(GOOD)).model_dump())} | {"data.sources", "optim"}
    for name, ours in ELSEWHERE.items():
        field = ours.split(" ")[0].rstrip(":,")
        assert field in known or field == "nothing", (name, ours)


def test_only_what_must_not_change_counts_as_changed(recipe: Callable[[str], Path]) -> None:
    path = recipe(GOOD)
    began = Recipe.load(path)
    later = Recipe.load(path, ["train.micro_batch_size=2", "checkpoint.save_steps=7", "model.path=/x", "log.data_order=true"])
    assert changed_fields(began, later) == []
    assert changed_fields(began, Recipe.load(path, ["optim.learning_rate=1"])) == [("optim.learning_rate", 2e-4, 1.0)]
    assert {key.split(".")[0] for key in FREE_IN_A_RUN} <= set(Recipe.model_fields)


def test_how_often_a_run_is_validated_may_change_unless_that_decides_something(recipe: Callable[[str], Path]) -> None:
    path = recipe(GOOD)
    often, seldom = (Recipe.load(path, [f"train.eval_steps={steps}"]) for steps in (5, 50))
    assert changed_fields(Recipe.load(path), often) == changed_fields(often, seldom) == changed_fields(often, Recipe.load(path)) == []
    for decides in ("train.early_stopping_patience=2", "train.load_best_model_at_end=true"):
        often, seldom = (Recipe.load(path, [f"train.eval_steps={steps}", decides]) for steps in (5, 50))
        assert changed_fields(often, seldom) == [("train.eval_steps", 5, 50)]
        assert decides.partition("=")[0] in {key: new for key, _, new in changed_fields(Recipe.load(path), often)}


@pytest.mark.parametrize("held_out", [["data.validation_fraction=0"], ["data.streaming=true", "train.steps=9"]])
def test_a_source_of_their_own_gives_validation_examples(recipe: Callable[[str], Path], held_out: list[str]) -> None:
    path = recipe(GOOD.replace("- path: x.jsonl", "- path: x.jsonl\n    - {path: y.jsonl, into: validation}"))
    assert Recipe.load(path, ["train.eval_steps=5", *held_out]).train.eval_steps == 5
