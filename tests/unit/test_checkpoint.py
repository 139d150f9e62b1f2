"""Checkpoints: whole or not there; damage is named and passed over."""

import builtins
import errno
import io
import json
import os
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mistral_dist import checkpoint, files
from mistral_dist.checkpoint import Noted, Progress, Snapshot, best_good, to_drop
from mistral_dist.config import Checkpoint
from mistral_dist.data.stream import Cursor
from mistral_dist.errors import CheckpointError
from mistral_dist.validation import Validation

NAME = "base_model.model.layers.0.q_proj.lora_A.default.weight"


def snapshot(step: int, adapter: dict[str, torch.Tensor] | None = None, metric: float | None = None, best_step: int = 0) -> Snapshot:
    return Snapshot(
        Progress(step, Cursor(step * 4), validation=Validation(best_step=best_step)),
        adapter={NAME: torch.full((2, 3), float(step))} if adapter is None else adapter,
        adapter_config=peft.LoraConfig(r=2, target_modules=["q_proj"]),
        moments={f"{NAME}.exp_avg": torch.ones(2, 3), f"{NAME}.exp_avg_sq": torch.ones(2, 3)},
        facts={"data": "abc"},
        metric=metric,
    )


def save(folder: Path, step: int, keep: int = 10, adapter: dict[str, torch.Tensor] | None = None) -> Path:
    return checkpoint.save(folder, snapshot(step, adapter), Checkpoint(save_total_limit=keep))


def test_what_is_saved_is_found_again(tmp_path: Path) -> None:
    path = save(tmp_path, 7)
    assert checkpoint.latest_good(tmp_path) == (path, [])
    assert checkpoint.load_progress(path) == (Progress(7, Cursor(28)), {"data": "abc", "metric": None})
    parameter = torch.nn.Parameter(torch.zeros(2, 3))
    checkpoint.load_adapter(path / "adapter", {NAME: parameter})
    assert parameter.tolist() == [[7.0] * 3] * 2
    assert set(checkpoint.load_moments(path)) == {f"{NAME}.exp_avg", f"{NAME}.exp_avg_sq"}


def test_only_safetensors_and_json(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    assert {file.suffix for file in path.rglob("*") if file.is_file()} == {".safetensors", ".json"}


def test_the_same_state_makes_the_same_bytes(tmp_path: Path) -> None:
    first, second = save(tmp_path / "a", 1), save(tmp_path / "b", 1)
    for file in first.rglob("*"):
        if file.is_file():
            assert file.read_bytes() == (second / file.relative_to(first)).read_bytes(), file.name


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (5, 10, 15):
        save(tmp_path, step, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-15"]


@pytest.mark.parametrize(
    ("found", "newest", "rules", "dropped"),
    [
        ({5: None}, 5, {"save_total_limit": 1}, set()),
        ({5: None, 10: None, 15: None}, 15, {"save_total_limit": 2}, {5}),
        ({5: None, 10: None, 15: None}, 15, {"save_total_limit": 5}, set()),
        # the best stay beside the last; of equal ones the first, as for the run itself
        ({5: 0.1, 10: 0.3, 15: 0.2, 20: 0.4}, 20, {"save_total_limit": 1, "save_best_limit": 1}, {10, 15}),
        ({5: 0.1, 10: 0.3, 15: 0.2, 20: 0.4}, 20, {"save_total_limit": 1, "save_best_limit": 2}, {10}),
        ({5: 0.1, 10: 0.1, 15: 0.2}, 15, {"save_total_limit": 1, "save_best_limit": 1}, {10}),
        # no evaluation, or one that gave no number, is never the best
        ({5: None, 10: float("nan"), 15: 0.9, 20: None}, 20, {"save_total_limit": 1, "save_best_limit": 2}, {5, 10}),
        # every n-th for good
        ({5: None, 10: None, 15: None, 20: None, 25: None}, 25, {"save_total_limit": 1, "keep_every_steps": 10}, {5, 15}),
        # one of an older start lies beyond the one just written, which stays
        ({200: None, 300: None}, 200, {"save_total_limit": 1}, set()),
    ],
)
def test_the_rules_decide_what_goes(found: dict[int, float | None], newest: int, rules: dict[str, int], dropped: set[int]) -> None:
    noted = {step: Noted(metric) for step, metric in found.items()}
    assert to_drop(noted, newest, Checkpoint(save_steps=5, **rules)) == dropped


BEST = {"save_steps": 10, "save_total_limit": 2, "save_best_limit": 1}


@pytest.mark.parametrize(
    ("found", "newest", "rules", "dropped"),
    [
        # those saved only because a validation was good do not push out the last ones
        ({10: Noted(), 20: Noted(), 21: Noted(0.3, 21), 22: Noted(0.2, 22)}, 22, BEST, {21}),
        ({10: Noted(), 20: Noted(), 21: Noted(0.3, 21), 22: Noted(0.2, 22)}, 22, {**BEST, "save_best_limit": 2}, set()),
        # one saved at a stop is among the last
        ({10: Noted(), 20: Noted(), 27: Noted()}, 27, BEST, {10}),
        # what one of the last knows as the best stays while the run may go back to it, though there is a better one now
        ({5: Noted(0.4, 5), 10: Noted(None, 5), 15: Noted(0.3, 15), 20: Noted(None, 15)}, 20, BEST, set()),
        ({5: Noted(0.4, 5), 15: Noted(0.3, 15), 20: Noted(None, 15), 30: Noted(None, 15)}, 30, BEST, {5}),
        # a stop came before the validation that made it the best: it notes no metric itself
        ({12: Noted(), 20: Noted(None, 12), 30: Noted(None, 12)}, 30, BEST, set()),
        # nothing of it where no best one is kept
        ({5: Noted(0.4, 5), 10: Noted(None, 5), 20: Noted(None, 5)}, 20, {**BEST, "save_best_limit": 0}, {5}),
    ],
)
def test_the_best_are_kept_as_the_run_needs_them(found: dict[int, Noted], newest: int, rules: dict[str, int], dropped: set[int]) -> None:
    assert to_drop(found, newest, Checkpoint(**rules)) == dropped


def test_the_best_is_found_or_the_next_best_that_is_whole(tmp_path: Path) -> None:
    rules = Checkpoint(save_steps=5, save_total_limit=9)
    paths = {
        step: checkpoint.save(tmp_path, snapshot(step, metric=metric, best_step=best), rules)
        for step, metric, best in [(5, 0.4, 5), (10, 0.2, 10), (15, 0.3, 10), (20, None, 10)]
    }
    assert best_good(tmp_path, 10) == paths[10]
    assert best_good(tmp_path, 20) == paths[20], "as the run knows: validated after it was saved"
    (paths[10] / "optimizer.safetensors").write_bytes(b"damaged")
    assert best_good(tmp_path, 10) == paths[15]
    for step in (5, 15):
        files.remove(paths[step])
    assert best_good(tmp_path, 10) is None


def test_a_checkpoint_from_before_there_were_validations_is_read(tmp_path: Path) -> None:
    path = save(tmp_path, 7)
    facts = json.loads((path / "progress.json").read_text())
    del facts["validation"]
    (path / "progress.json").write_text(json.dumps(facts))
    assert checkpoint.load_progress(path)[0] == Progress(7, Cursor(28))


def test_metrics_are_made_half_a_step_further_where_the_step_was_validated() -> None:
    assert Progress(7).reached == 7
    assert Progress(7, validation=Validation(step=7)).reached == 7.5
    assert Progress(8, validation=Validation(step=7)).reached == 8


METRICS = st.one_of(st.none(), st.floats())


@given(
    st.dictionaries(st.integers(1, 500), METRICS, min_size=1),
    st.data(),
    st.integers(1, 5),
    st.integers(0, 5),
    st.none() | st.integers(1, 50),
)
def test_the_newest_the_last_the_best_and_the_regular_are_never_dropped(
    found: dict[int, float | None], data: st.DataObject, last: int, best: int, every: int | None
) -> None:
    newest = data.draw(st.sampled_from(sorted(found)))
    rules = Checkpoint(save_steps=5, save_total_limit=last, save_best_limit=best, keep_every_steps=every)
    kept = found.keys() - to_drop({step: Noted(metric) for step, metric in found.items()}, newest, rules)
    assert newest in kept
    assert set(sorted(step for step in found if step % 5 == 0 or found[step] is None)[-last:]) <= kept
    assert {step for step in found if every and step % every == 0} <= kept
    measured = sorted(metric for metric in found.values() if metric is not None and metric == metric)
    kept_values = sorted(metric for step in kept if (metric := found[step]) is not None and metric == metric)
    assert kept_values[: min(best, len(measured))] == measured[:best]
    regular = 0 if every is None else sum(step % every == 0 for step in found)
    assert len(kept) <= 1 + last + best + regular, "and nothing else is kept"


@given(st.integers(1, 40), st.integers(1, 4), st.integers(1, 60))
def test_there_is_always_a_checkpoint_that_is_old_enough_to_go_back_to(every: int, last: int, reach: int) -> None:
    """And it is not older than need be, nor are many kept for it."""
    rules, kept = Checkpoint(save_steps=every, save_total_limit=last), set[int]()
    for step in range(1, 400):
        if step > reach + every:  # a trouble is seen before the step is saved
            old = max(at for at in kept if at <= step - reach)
            assert step - old <= 2 * (reach + every)
        if step % every == 0:
            kept.add(step)
            kept -= to_drop({at: Noted() for at in kept}, step, rules, reach)
            assert len(kept) <= last + 2


def test_the_best_stay_on_the_disk(tmp_path: Path) -> None:
    rules = Checkpoint(save_steps=5, save_total_limit=1, save_best_limit=1)
    for step, metric in ((5, 0.5), (10, 0.3), (15, None), (20, 0.9)):
        checkpoint.save(tmp_path, snapshot(step, metric=metric), rules)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-20"]
    assert checkpoint.load_progress(tmp_path / "checkpoint-10")[1]["metric"] == 0.3


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


def empty(file: Path) -> None:
    file.write_bytes(b"")


def add(file: Path) -> None:
    file.with_name(file.name + ".old").write_bytes(b"")


MANIFEST = "manifest.json"
FILES = ("adapter/adapter_config.json", "adapter/adapter_model.safetensors", "optimizer.safetensors", "progress.json")


@pytest.mark.parametrize(
    ("file", "harm", "words"),
    [
        *((file, flip, f"{file} has another checksum") for file in FILES),
        *((file, truncate, f"{file} has") for file in FILES),
        *((file, empty, f"{file} has 0 bytes") for file in FILES),
        *((file, os.unlink, f"{file} is missing") for file in FILES),
        *((file, add, f"{file}.old is not of it") for file in (*FILES, MANIFEST)),
        (MANIFEST, os.unlink, "manifest.json is missing"),
        (MANIFEST, empty, "manifest.json cannot be read"),
        (MANIFEST, lambda file: file.write_bytes(file.read_bytes()[:-20]), "manifest.json cannot be read"),
        (MANIFEST, lambda file: file.write_text(file.read_text().replace('"bytes"', '"bytet"')), "manifest.json cannot be read"),
        (MANIFEST, lambda file: file.write_text("[]"), "manifest.json cannot be read"),
        (MANIFEST, lambda file: file.write_text('{"files": {}}'), "is not of it"),
    ],
)
def test_damage_is_named_and_the_one_before_is_used(tmp_path: Path, file: str, harm: Callable[[Path], Any], words: str) -> None:
    good, bad = save(tmp_path, 5), save(tmp_path, 10)
    harm(bad / file)
    found, damaged = checkpoint.latest_good(tmp_path)
    assert found == good
    assert len(damaged) == 1
    assert "checkpoint-10" in damaged[0]
    assert words in damaged[0]


def test_what_file_servers_leave_is_no_damage(tmp_path: Path) -> None:
    path = save(tmp_path, 5)
    (path / "adapter" / ".nfs0001").write_bytes(b"x")
    assert checkpoint.verify(path) is None


def test_damaged_ones_do_not_push_out_good_ones(tmp_path: Path) -> None:
    """Retention keeps the newest: a damaged newer one must not count among them."""
    save(tmp_path, 200)
    flip(save(tmp_path, 300) / "optimizer.safetensors")
    assert checkpoint.latest_good(tmp_path)[0] == tmp_path / "checkpoint-200"
    newest = save(tmp_path, 250, keep=1)
    assert checkpoint.latest_good(tmp_path) == (newest, [])


def test_where_all_are_damaged_every_look_finds_the_same(tmp_path: Path) -> None:
    for step in (5, 10):
        (save(tmp_path, step) / "manifest.json").unlink()
    told = [f"checkpoint-{step} is damaged (manifest.json is missing)" for step in (10, 5)]
    assert [checkpoint.latest_good(tmp_path) for _ in range(2)] == [(None, told)] * 2


def test_a_damaged_one_takes_the_first_name_that_is_free(tmp_path: Path) -> None:
    save(tmp_path, 5)
    (tmp_path / "damaged-checkpoint-10-2" / "adapter").mkdir(parents=True)
    for _ in range(2):
        flip(save(tmp_path, 10) / "progress.json")
        checkpoint.latest_good(tmp_path)
    assert {path.name for path in tmp_path.glob("damaged-*")} == {f"damaged-checkpoint-10-{number}" for number in (1, 2, 3)}


@pytest.mark.parametrize("file", [*FILES, MANIFEST])
def test_one_that_cannot_be_read_is_passed_over_and_left_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    good, bad = save(tmp_path, 5), save(tmp_path, 10)
    real = io.open

    def unwell(path: Any, *words: Any, **more: Any) -> Any:
        if path == bad / file:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return real(path, *words, **more)

    with monkeypatch.context() as patch:
        patch.setattr(io, "open", unwell)
        patch.setattr(builtins, "open", unwell)
        assert checkpoint.latest_good(tmp_path) == (good, ["checkpoint-10 cannot be read (Input/output error)"])
    assert checkpoint.latest_good(tmp_path) == (bad, [])


@pytest.mark.parametrize("moment", ["save_adapter", "_manifest", "publish"])
def test_a_save_that_is_cut_short_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    before = save(tmp_path, 5)

    def killed(*_: object, **__: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoint, moment, killed)
    with pytest.raises(OSError, match="No space"):
        save(tmp_path, 10)
    assert checkpoint.latest_good(tmp_path) == (before, [])
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-5"]


@pytest.mark.parametrize("can_exchange", [True, False])
def test_what_is_published_again_takes_the_place_of_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_exchange: bool
) -> None:
    """At no moment without one of the two, where names can be exchanged."""
    renamed: list[Path] = []
    monkeypatch.setattr(Path, "rename", lambda self, target: renamed.append(self) or os.rename(self, target))
    if not can_exchange:
        monkeypatch.setattr(files, "_exchange", lambda *_: False)
    for content in ("first", "second", "third"):
        aside = files.aside_of(tmp_path / "it")
        aside.mkdir()
        (aside / content).write_text(content)
        files.publish(aside, tmp_path / "it")
        assert [file.name for file in (tmp_path / "it").iterdir()] == [content]
        assert list(tmp_path.iterdir()) == [tmp_path / "it"]
    assert len(renamed) == (1 if can_exchange else 5)


def test_sweep_removes_what_a_killed_save_left(tmp_path: Path) -> None:
    (tmp_path / ".aside-checkpoint-3-x" / "adapter").mkdir(parents=True)
    save(tmp_path, 5)
    files.sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-5"]


def test_saving_a_step_again_replaces_a_damaged_one(tmp_path: Path) -> None:
    flip(save(tmp_path, 5) / "optimizer.safetensors")
    save(tmp_path, 5)
    assert checkpoint.latest_good(tmp_path)[1] == []


@pytest.mark.parametrize(
    ("adapter", "words"),
    [
        ({}, "empty"),
        ({NAME: torch.zeros(0)}, "empty"),
        ({NAME: torch.tensor([1.0, float("nan")])}, "not finite, first in base_model.model.layers.0.q_proj.lora_A.weight"),
        ({NAME: torch.tensor([float("inf")])}, "not finite"),
    ],
)
def test_an_adapter_that_would_not_load_is_not_saved(tmp_path: Path, adapter: dict[str, torch.Tensor], words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        save(tmp_path, 5, adapter=adapter)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_lies_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "load_file", lambda file: {checkpoint.peft_name(NAME): torch.zeros(2, 3)})
    with pytest.raises(OSError, match="read back is not the one that is trained"):
        save(tmp_path, 5)


@pytest.mark.parametrize(
    "parameters", [{}, {NAME: torch.nn.Parameter(torch.zeros(3, 3))}, {NAME + "x": torch.nn.Parameter(torch.zeros(2, 3))}]
)
def test_another_recipes_adapter_is_refused(tmp_path: Path, parameters: dict[str, torch.nn.Parameter]) -> None:
    with pytest.raises(CheckpointError, match="lora_A"):
        checkpoint.load_adapter(save(tmp_path, 5) / "adapter", parameters)


def test_the_manifest_says_with_what_it_was_made(tmp_path: Path) -> None:
    manifest = json.loads((save(tmp_path, 5) / "manifest.json").read_text())
    assert manifest["versions"]["torch"] == metadata.version("torch")
    assert manifest["files"].keys() == {
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "optimizer.safetensors",
        "progress.json",
    }
