"""From a run's adapter to a folder that is served: the merge, the comparison, what is refused, what is left behind."""

import json
import re
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from examples.serving.classify import question
from mistral_dist.base import open_checkpoint
from mistral_dist.card import model_card
from mistral_dist.checkpoint import publish_adapter
from mistral_dist.config import Recipe
from mistral_dist.data.encode import load_encoder
from mistral_dist.errors import CheckpointError, MachineError, ModelError, RecipeError, RunError
from mistral_dist.evaluate import recipe_of
from mistral_dist.export import merge, verb
from mistral_dist.export.forms import Form, form_named
from mistral_dist.export.likeness import AT_LEAST, POSITIONS, TOKENS, Questions
from mistral_dist.export.merge import Update, write_merged
from mistral_dist.export.verb import Options, export
from mistral_dist.hub import load_tokenizer
from mistral_dist.model import adapter_parameters, build_trainable
from mistral_dist.run import RunDirectory
from tests.conftest import LABELS, WriteRecipe
from tests.launch import COMMAND, mistral_dist, small_disk, wait_for

CPU = torch.device("cpu")


def finished(recipe: Recipe) -> RunDirectory:
    """A run directory as one with that recipe and a random adapter would leave it."""
    run = RunDirectory(recipe.run_dir)
    run.path.mkdir(parents=True)
    (run.path / "recipe.yaml").write_text(recipe.dump())
    model = build_trainable(recipe, CPU, "sdpa")
    adapter = {
        name: parameter.detach() * (1.25 if "modules_to_save" in name else 1) for name, parameter in adapter_parameters(model).items()
    }
    publish_adapter(run.adapter, adapter, model.peft_config["default"], load_tokenizer(recipe.model), model_card(recipe, "7 examples", 3))
    return run


@pytest.fixture(scope="module")
def run(recipe_writer: Callable[[Path], WriteRecipe], tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """With prepared data; an adapter that moves the model by much more than rounding does."""
    file = recipe_writer(tmp_path_factory.mktemp("export"))(lora={"r": 4, "lora_alpha": 1, "init_lora_weights": False})
    assert mistral_dist("prepare", file).returncode == 0
    return finished(Recipe.load(file))


def exported(run: RunDirectory, out: Path, *overrides: str, **options: Any) -> tuple[Form, list[tuple[str, ...]], dict[str, Any]]:
    form, rows = export(run, recipe_of(run, overrides, ("model.dtype=",)), out, Options(**options), lambda _: None)
    return form, rows, json.loads((out / "export.json").read_text())["compared"]


def test_the_form_that_was_trained_is_found_and_written(run: RunDirectory, tmp_path: Path) -> None:
    """In float32 the NF4-faithful merge is the live adapter but for rounding, and the other forms are not."""
    form, (head, *rows), compared = exported(run, tmp_path / "out")
    assert form is Form.NF4
    assert head == ("form", "KL", "largest KL", "loss", "same next token", "same answer", "accuracy")
    assert [row[0] for row in rows] == ["live adapter", "adapter", "merged-bf16", "merged-nf4"]
    found = compared["merged-nf4"]
    assert found["max_logit_difference"] <= 1e-4
    assert found["max_kl"] <= 1e-9
    assert (found["same_token"], found["same_answer"], found["accuracy"]) == (1.0, 1.0, found["live_accuracy"])
    assert found["loss"] == pytest.approx(found["live_loss"], abs=1e-5)
    for other in ("adapter", "merged-bf16"):  # NF4 is no rounding error
        assert compared[other]["kl"] > 1e-3
    assert compared["adapter"]["kl"] == pytest.approx(compared["merged-bf16"]["kl"], rel=1e-2), "one function, merged or not"


def test_the_comparison_sees_a_merge_that_is_wrong(run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapter merged at half its scale."""
    real = Update.__init__

    def halved(self: Update, folder: Path) -> None:
        real(self, folder)
        self.scaling /= 2

    monkeypatch.setattr(Update, "__init__", halved)
    _, _, compared = exported(run, tmp_path / "out", form=Form.NF4, tolerance=100.0)
    assert compared["merged-nf4"]["max_logit_difference"] > 1e-2
    assert compared["merged-nf4"]["kl"] > 1e-5


def test_in_bfloat16_it_is_that_but_for_its_rounding(run: RunDirectory, tmp_path: Path) -> None:
    form, _, compared = exported(run, tmp_path / "out", "model.dtype=bfloat16")
    assert form is Form.NF4
    assert compared["merged-nf4"]["kl"] <= 2e-3
    assert all(compared["merged-nf4"]["kl"] < 0.1 * compared[other]["kl"] for other in ("adapter", "merged-bf16"))
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_folder_is_all_that_an_engine_needs(run: RunDirectory, tmp_path: Path) -> None:
    """Loaded by plain transformers; the prompt by its chat template is the one that was trained; the sums are right."""
    out = tmp_path / "out"
    exported(run, out, form=Form.NF4, compare=False)
    recipe = run.recipe()
    encoder, tokenizer = load_encoder(recipe), transformers.AutoTokenizer.from_pretrained(out)
    turns = [{"role": "system", "content": "Answer."}, *encoder.question("An array.")]
    assert tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False) == encoder.prompt(
        encoder.question("An array.")
    )
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert model.generation_config.eos_token_id == encoder.tokenizer.eos_token_id
    assert not model.generation_config.do_sample
    written = model.generate(torch.tensor([encoder.prompt(encoder.question("An array."))]), max_new_tokens=4)
    assert written.shape[1] > 4
    done = subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=out, check=False)
    assert done.returncode == 0
    named = {line.split("  ")[1] for line in (out / "SHA256SUMS").read_text().splitlines()}
    assert named == {path.name for path in out.iterdir()} - {"SHA256SUMS"}
    card = (out / "README.md").read_text()
    for words in ("merged-nf4", "3 steps on 7 examples", "test/small", "Which of numpy, pandas", "It was not compared"):
        assert words in card


def test_the_adapter_alone_is_a_folder_of_pefts(run: RunDirectory, tmp_path: Path) -> None:
    form, _, compared = exported(run, tmp_path / "out", form=Form.ADAPTER, tolerance=100.0)
    assert form is Form.ADAPTER
    assert set(compared) == {"adapter"}
    assert not list((tmp_path / "out").glob("model*"))
    base = transformers.AutoModelForCausalLM.from_pretrained(run.recipe().model.path)
    model = peft.PeftModel.from_pretrained(base, str(tmp_path / "out"))
    assert any("lora_A" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize(
    "lora",
    [
        {"r": 8, "lora_alpha": 16, "use_rslora": True},
        {"target_modules": ["q_proj", "down_proj"]},
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["v_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    ],
    ids=str,
)
def test_a_merge_is_what_peft_merges(write_recipe: WriteRecipe, tmp_path: Path, lora: dict[str, Any]) -> None:
    """Into an unquantized base, where PEFT's own is exact; every parameter."""
    untied = tmp_path / "untied"
    recipe = Recipe.load(write_recipe(lora={"init_lora_weights": False, **lora}, model={"quantization": "none"}), [])
    base: Any = transformers.AutoModelForCausalLM.from_pretrained(recipe.model.path)
    base.config.tie_word_embeddings = False
    base.lm_head.weight = torch.nn.Parameter(base.lm_head.weight.detach() * 1.5)
    base.save_pretrained(untied)
    load_tokenizer(recipe.model).save_pretrained(untied)
    recipe = Recipe.load(write_recipe(lora={"init_lora_weights": False, **lora}, model={"quantization": "none", "path": str(untied)}), [])
    run = finished(recipe)
    files = open_checkpoint(recipe.model, CPU)
    assert files is not None
    write_merged(Form.BF16, files, Update(run.adapter), tmp_path, lambda *_: None)
    ours = load_file(tmp_path / "model.safetensors")
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(untied, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(model, str(run.adapter)).merge_and_unload().state_dict()
    assert ours.keys() == theirs.keys()
    changed = {name for name, tensor in files_of(untied).items() if not torch.equal(tensor, ours[name])}
    assert changed == Update(run.adapter).names
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=1e-6, msg=name)


def files_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}


def test_several_files_are_the_same_model(run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exported(run, tmp_path / "one", form=Form.NF4, compare=False)
    monkeypatch.setattr(merge, "SHARD_BYTES", 20 * 10**6)
    exported(run, tmp_path / "several", form=Form.NF4, compare=False)
    shards = sorted((tmp_path / "several").glob("model-*.safetensors"))
    index = json.loads((tmp_path / "several" / "model.safetensors.index.json").read_text())
    assert len(shards) > 3
    assert set(index["weight_map"].values()) == {shard.name for shard in shards}
    one, several = (transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("one", "several"))
    assert one.keys() == several.keys()
    assert all(torch.equal(one[name], several[name]) for name in one)


def test_a_form_that_is_another_model_is_refused(run: RunDirectory, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"merged-bf16: is not the model that was trained \(mean KL in nats: merged-bf16 "):
        exported(run, tmp_path / "out", form=Form.BF16, tolerance=1e-6)
    assert list(tmp_path.iterdir()) == [], "nothing is left"


def other_shapes(run: RunDirectory) -> Any:
    """An adapter of a base whose layers take 7 inputs."""
    update = Update(run.adapter)
    update._added = {name: (first, second[:, :7]) for name, (first, second) in update._added.items()}
    return lambda _: update


def test_the_questions_are_few_enough_also_where_prompts_are_long(run: RunDirectory) -> None:
    """But never fewer than some."""

    def asked(tokens: int, targets: int) -> int:
        records = [{"id": f"{n:03}", "tokens": tokens, "targets": targets} for n in reversed(range(300))]
        return len(Questions(run.recipe(), load_encoder(run.recipe()), records))

    assert asked(tokens=100, targets=2) == TOKENS // 100
    assert asked(tokens=20, targets=10) == -(-POSITIONS // 10)
    assert asked(tokens=2 * TOKENS, targets=2) == AT_LEAST
    assert asked(tokens=2 * TOKENS, targets=POSITIONS) == 1


def test_a_base_that_has_moved_is_followed_to_the_card(
    recipe_writer: Callable[[Path], WriteRecipe], small_model: Path, tmp_path: Path
) -> None:
    """Nothing is looked for at its old place, also not its licence."""
    old, new = tmp_path / "old", tmp_path / "new"
    shutil.copytree(small_model, old)
    (old / "README.md").write_text("---\nlicense: mit\n---\n")
    run = finished(Recipe.load(recipe_writer(tmp_path)(model={"path": str(old)}, lora={"r": 4})))
    old.rename(new)
    moved = recipe_of(run, [f"model.path={new}"])
    export(run, moved, tmp_path / "out", Options(Form.NF4, compare=False), lambda _: None)
    assert "license: mit" in (tmp_path / "out" / "README.md").read_text()


def test_of_a_base_that_was_not_quantized_the_best_is_a_whole_model(recipe_writer: Callable[[Path], WriteRecipe], tmp_path: Path) -> None:
    file = recipe_writer(tmp_path)(model={"quantization": "none"}, lora={"r": 4, "init_lora_weights": False})
    assert mistral_dist("prepare", file).returncode == 0
    form, _, compared = exported(finished(Recipe.load(file)), tmp_path / "out")
    assert form is Form.BF16
    assert compared["adapter"]["kl"] <= compared["merged-bf16"]["kl"] < 1e-6


def test_another_base_is_not_merged_into(run: RunDirectory, tmp_path: Path) -> None:
    """Though a comparison with itself would find it right."""
    other = tmp_path / "run"
    shutil.copytree(run.path, other)
    (other / "status.json").write_text(json.dumps({"base": "0123456789abcdef"}))
    with pytest.raises(RunError, match="was trained on other files of the base test/small"):
        exported(RunDirectory(other), tmp_path / "out", form=Form.NF4, compare=False)


def test_a_damaged_base_or_adapter_is_one_line(recipe_writer: Callable[[Path], WriteRecipe], small_model: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(small_model, base)
    run = finished(Recipe.load(recipe_writer(tmp_path)(model={"path": str(base)}, lora={"r": 4})))
    weights = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(weights[:100_000])
    with pytest.raises(ModelError, match=rf"{base}: cannot be read \(.*\); fetch or copy the base again"):
        exported(run, tmp_path / "out", form=Form.NF4, compare=False)
    (base / "model.safetensors").write_bytes(weights)
    file = run.adapter / "adapter_model.safetensors"
    whole = load_file(file)
    save_file({name: tensor for name, tensor in whole.items() if "layers.0.self_attn.q_proj.lora_B" not in name}, file)
    with pytest.raises(CheckpointError, match="the adapter cannot be read"):
        exported(run, tmp_path / "out", form=Form.NF4, compare=False)


@pytest.mark.parametrize(
    ("template", "turns"),
    [
        (None, [{"role": "system", "content": 'Say "a"\nor `b`.'}]),
        (
            "{{ raise_exception('no system turn') if messages[0].role == 'system' }}"
            "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
            "{{ '<|im_start|>assistant\n' if add_generation_prompt }}",
            [],
        ),
    ],
)
def test_a_client_that_asks_as_the_folder_says_asks_as_training_did(
    recipe_writer: Callable[[Path], WriteRecipe], small_model: Path, tmp_path: Path, template: str | None, turns: list[Any]
) -> None:
    """Also where the chat template refuses a system turn, so that training put its text before the question."""
    base, system, prompt = tmp_path / "base", 'Say "a"\nor `b`.', "Which of {labels}?\n```\n{text}\n```"
    shutil.copytree(small_model, base)
    if template is not None:
        (base / "chat_template.jinja").write_text(template)
    task = {"prompt": prompt, "system": system}
    run = finished(Recipe.load(recipe_writer(tmp_path)(task=task, model={"path": str(base)}, lora={"r": 4})))
    exported(run, tmp_path / "out", form=Form.ADAPTER, compare=False)
    about = json.loads((tmp_path / "out" / "export.json").read_text())["task"]
    asked = question(about, "An array.")
    assert asked[: len(turns)] == turns
    assert len(asked) == len(turns) + 1
    encoder, tokenizer = load_encoder(run.recipe()), transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False) == encoder.prompt(
        encoder.question("An array.")
    )
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"```\n{system}\n```" in card
    assert f"````\nWhich of {', '.join(LABELS)}?\n```\n{{text}}\n```\n````" in card
    assert ("Begin with this system turn:" in card) == (template is None)


def test_the_card_of_plain_text_says_how_a_text_begins(recipe_writer: Callable[[Path], WriteRecipe], tmp_path: Path) -> None:
    """SmolLM2's tokenizer has a token for the beginning, and does not put it there."""
    task = {"kind": "pretrain", "labels": [], "system": None}
    run = finished(Recipe.load(recipe_writer(tmp_path)(task=task, lora={"r": 4})))
    exported(run, tmp_path / "out", form=Form.ADAPTER, compare=False)
    encoder, tokenizer = load_encoder(run.recipe()), transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    (begin,) = re.findall(r"behind `(.+)`, which its tokenizer", (tmp_path / "out" / "README.md").read_text())
    assert tokenizer.encode(f"{begin}An array.") == encoder.prompt([{"role": "user", "content": "An array."}])


def test_a_model_whose_logits_are_no_numbers_is_never_taken(run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Update.of
    monkeypatch.setattr(Update, "of", lambda self, name, weight: real(self, name, weight) * (1e30 if name.endswith("norm.weight") else 1))
    with pytest.raises(CheckpointError, match="merged-nf4: its logits are not finite on validation examples; it cannot be compared"):
        exported(run, tmp_path / "out", form=Form.NF4, tolerance=100.0)
    assert list(tmp_path.iterdir()) == []


def test_what_appears_meanwhile_is_left_alone(run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = verb.write_merged

    def meanwhile(*words: Any) -> None:
        real(*words)
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine").write_text("of the user")

    monkeypatch.setattr(verb, "write_merged", meanwhile)
    with pytest.raises(RunError, match="out: is there already"):
        exported(run, tmp_path / "out", form=Form.NF4, compare=False)
    assert (tmp_path / "out" / "mine").read_text() == "of the user"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_cannot_be_is_refused_before_a_model_is_loaded(
    run: RunDirectory, tmp_path: Path, write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verb, "load_tuned", None)
    recipe = run.recipe()
    (tmp_path / "there").mkdir()
    with pytest.raises(RunError, match="there: is there already"):
        exported(run, tmp_path / "there")
    plain = Recipe.load(write_recipe(model={"quantization": "none"}))
    with pytest.raises(RecipeError, match=r"--form merged-nf4: .*use one of adapter, merged-bf16"):
        export(run, plain, tmp_path / "out", Options(Form.NF4), print)
    with pytest.raises(RecipeError, match="--no-compare"):
        export(run, recipe, tmp_path / "out", Options(None, compare=False), print)
    with pytest.raises(RecipeError, match="--form merged: there are adapter, merged-bf16, merged-nf4 and best"):
        form_named("merged")
    with pytest.raises(RunError, match=r"lora\.r=8: is part of what was trained"):
        exported(run, tmp_path / "out", "lora.r=8")
    monkeypatch.setattr(verb, "free_bytes", lambda _: 10**6)
    with pytest.raises(MachineError, match=r"a merged model needs \d[\d,]+ bytes, 1,000,000 bytes are free"):
        exported(run, tmp_path / "out", form=Form.NF4)
    with pytest.raises(MachineError, match="2 merged models, of which one stays, need"):
        exported(run, tmp_path / "out")
    monkeypatch.setattr(verb, "Update", other_shapes(run))
    with pytest.raises(CheckpointError, match=r"has no model\.layers\.0\.\S+ of shape \(\d+, 7\), which the adapter changes"):
        exported(run, tmp_path / "out", form=Form.NF4)
    monkeypatch.undo()
    with pytest.raises(RunError, match="lies in the run"):
        exported(run, run.path / "adapter" / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"there", "small.jsonl", "small.yaml"}


def test_a_weight_that_overflows_is_refused(run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Update, "of", lambda self, name, weight: weight / 0)
    with pytest.raises(CheckpointError, match="is not finite once the adapter is merged"):
        exported(run, tmp_path / "out", form=Form.NF4, compare=False)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_line(run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It fills up while the files are written: what was free at the start was enough."""
    with small_disk(tmp_path / "disk", "40m") as disk:
        monkeypatch.setattr(verb, "free_bytes", lambda _: 10**12)
        with pytest.raises(
            MachineError, match=r"the export could not be saved: No space left on device \([\d,]+ bytes are free\); make room"
        ) as raised:
            exported(run, disk / "out", form=Form.NF4, compare=False)
        assert "\n" not in str(raised.value)
        assert list(disk.iterdir()) == [], "nothing is left"


def test_a_killed_export_leaves_nothing_that_looks_finished(run: RunDirectory, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = [*COMMAND, "export", str(run.path), str(out), "--form", "merged-nf4", "--no-compare"]
    started = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_for(lambda: any(tmp_path.glob(".aside-out-*/*")), started)
    started.send_signal(signal.SIGKILL)
    started.wait()
    assert not out.exists()
    assert list(tmp_path.iterdir()), "killed in the middle"
    done = mistral_dist("export", run.path, out, "--form", "merged-nf4", "--no-compare")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{out}: merged-nf4" in done.stdout.replace("\n", "")
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "what was left is gone"
