"""Processes, signals, the launcher's line, and what may stand in a DeepSpeed configuration."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from mistral_dist.config import Recipe
from mistral_dist.errors import MachineError, RecipeError
from mistral_dist.runtime import process
from mistral_dist.runtime.engine import seed_noise
from mistral_dist.runtime.launcher import Line, threads_per_process
from mistral_dist.runtime.process import StopRequest
from mistral_dist.runtime.zero import accumulation_steps, resolve_deepspeed

ROOT = Path(__file__).parent.parent.parent
ZERO2 = json.loads((ROOT / "configs" / "deepspeed" / "zero2.json").read_text())


def recipe(**train: int) -> Recipe:
    return Recipe.model_validate(
        {
            "version": 1,
            "task": {"kind": "chat"},
            "data": {"sources": [{"path": "x.jsonl"}]},
            "model": {"name": "org/model"},
            "optim": {"max_grad_norm": 0.3},
            "train": train,
        }
    )


# accumulation


@pytest.mark.parametrize(
    ("packs", "micro", "ranks", "steps"),
    [
        (8, 1, 1, 8),
        (8, 1, 2, 4),
        (8, 1, 8, 1),
        (8, 2, 2, 2),
        (8, 8, 1, 1),
        (8, 16, 1, 1),
        (8, 1, 3, 3),  # ceil(8 / 3) slots each, the last of them empty on one rank
        (8, 2, 3, 2),
        (7, 2, 2, 2),
        (5, 3, 4, 1),
        (1, 1, 1, 1),
    ],
)
def test_accumulation_follows_from_the_global_batch(packs: int, micro: int, ranks: int, steps: int) -> None:
    assert accumulation_steps(recipe(global_batch_size=packs, micro_batch_size=micro), ranks) == steps
    assert steps * micro * ranks >= packs > (steps - 1) * micro * ranks


def test_more_ranks_than_packs_are_refused() -> None:
    with pytest.raises(RecipeError) as caught:
        accumulation_steps(recipe(global_batch_size=4), 5)
    for word in ["train.global_batch_size=4", "5 GPUs", "at most 4"]:
        assert word in str(caught.value)


# DeepSpeed


def test_what_is_left_open_is_filled_from_the_recipe() -> None:
    found = resolve_deepspeed(ZERO2, recipe(global_batch_size=8, micro_batch_size=2), 3)
    decided = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "train_batch_size": 12,
        "gradient_clipping": 0.3,
    }
    assert found == {**ZERO2, **decided}
    assert found["train_batch_size"] == 2 * 2 * 3
    assert "auto" not in json.dumps(found)
    assert ZERO2["train_batch_size"] == "auto", "the configuration that was read is not changed"


def test_what_is_left_out_is_filled_too() -> None:
    assert resolve_deepspeed({"zero_optimization": {"stage": 1}}, recipe(global_batch_size=4), 2)["gradient_accumulation_steps"] == 2


def test_a_number_that_agrees_with_the_recipe_may_stand() -> None:
    assert resolve_deepspeed({**ZERO2, "gradient_accumulation_steps": 2}, recipe(global_batch_size=4), 2)["train_batch_size"] == 4


@pytest.mark.parametrize(
    ("key", "value", "made"),
    [
        ("train_micro_batch_size_per_gpu", 4, "1"),
        ("gradient_accumulation_steps", 1, "2"),
        ("train_batch_size", 16, "4"),
        ("gradient_clipping", 1.0, "0.3"),
        ("gradient_clipping", 0, "0.3"),
    ],
)
def test_a_number_that_contradicts_the_recipe_is_refused(key: str, value: float, made: str) -> None:
    with pytest.raises(MachineError) as caught:
        resolve_deepspeed({**ZERO2, key: value}, recipe(global_batch_size=4), 2, "mine.json")
    for word in ["mine.json", f"{key} is {value}", f"makes it {made}", '"auto"']:
        assert word in str(caught.value)


@pytest.mark.parametrize("key", ["bf16", "fp16", "torch_autocast", "amp"])
@pytest.mark.parametrize("enabled", [True, "auto"])
def test_an_engine_that_casts_is_refused(key: str, enabled: bool | str) -> None:
    with pytest.raises(MachineError, match=f"mine.json: {key} must not be enabled.*remove the section"):
        resolve_deepspeed({**ZERO2, key: {"enabled": enabled}}, recipe(), 2, "mine.json")


def test_a_precision_that_is_switched_off_may_stand() -> None:
    assert resolve_deepspeed({**ZERO2, "fp16": {"enabled": False}}, recipe(), 2)["fp16"] == {"enabled": False}


@pytest.mark.parametrize(
    "key",
    ["communication_data_type", "gradient_allreduce_op", "zero_optimization.zero_quantized_gradients", "zero_optimization.zenflow"],
)
def test_what_would_round_gradients_is_refused(key: str) -> None:
    section, _, name = key.rpartition(".")
    config = {**ZERO2, section: {**ZERO2[section], name: True}} if section else {**ZERO2, name: "bf16"}
    with pytest.raises(MachineError, match=f"mine.json: {key} changes what is learned; remove it"):
        resolve_deepspeed(config, recipe(), 2, "mine.json")


@pytest.mark.parametrize("dtype", [None, "fp32", "bf16"])
def test_gradients_are_gathered_in_float32(dtype: str | None) -> None:
    config = {**ZERO2, "data_types": {"grad_accum_dtype": dtype}}
    if dtype != "bf16":
        assert resolve_deepspeed(config, recipe(), 2, "mine.json")["data_types"] == {"grad_accum_dtype": dtype}
        return
    with pytest.raises(MachineError, match=r'mine\.json: data_types\.grad_accum_dtype changes what is learned; write "fp32"'):
        resolve_deepspeed(config, recipe(), 2, "mine.json")


@pytest.mark.parametrize("key", ["optimizer", "scheduler"])
def test_what_the_recipe_decides_is_refused(key: str) -> None:
    with pytest.raises(MachineError, match=f"mine.json: {key} is the recipe's to decide"):
        resolve_deepspeed({**ZERO2, key: {"type": "AdamW"}}, recipe(), 2, "mine.json")


@pytest.mark.parametrize("zero", [None, {}, {"stage": 0}, {"stage": 4}, {"stage": "auto"}])
def test_a_stage_must_be_named(zero: dict[str, Any] | None) -> None:
    config = {key: value for key, value in ZERO2.items() if key != "zero_optimization"}
    with pytest.raises(MachineError, match=r"mine\.json: zero_optimization\.stage must be 1, 2 or 3"):
        resolve_deepspeed(config if zero is None else {**config, "zero_optimization": zero}, recipe(), 2, "mine.json")


OFFLOAD = json.loads((ROOT / "configs" / "deepspeed" / "zero2_offload.json").read_text())


@pytest.mark.parametrize(
    ("section", "beside", "words"),
    [
        ({"offload_param": {"device": "cpu"}}, {}, r"offload_param: not supported; .*remove the section"),
        ({"offload_optimizer": {"device": "nvme"}}, {}, r"offload_optimizer\.device: must be cpu or none, not nvme"),
        ({"offload_optimizer": {"device": "cpu", "ratio": 0.5}}, {}, r"offload_optimizer\.ratio: .*only device and pin_memory may be set"),
        ({"stage": 1}, {}, r"offload_optimizer: goes with stage 2 or 3; use configs/deepspeed/zero2_offload\.json"),
        ({}, {"zero_force_ds_cpu_optimizer": True}, r'offload_optimizer: needs "zero_force_ds_cpu_optimizer": false'),
    ],
)
def test_an_offload_that_is_not_known_to_work_is_refused(section: dict[str, Any], beside: dict[str, Any], words: str) -> None:
    config = {**OFFLOAD, "zero_optimization": {**OFFLOAD["zero_optimization"], **section}, **beside}
    with pytest.raises(MachineError, match=rf"mine\.json: zero_optimization\.{words}"):
        resolve_deepspeed(config, recipe(), 2, "mine.json")


@pytest.mark.parametrize("section", [None, {}, {"device": "none"}])
def test_an_offload_that_is_switched_off_may_stand(section: dict[str, str] | None) -> None:
    zero = {**ZERO2["zero_optimization"], "offload_optimizer": section, "offload_param": section}
    assert resolve_deepspeed({**ZERO2, "zero_optimization": zero}, recipe(), 2)["zero_optimization"] == zero


# noise


def drawn(seed: int, step: int, slot: int) -> list[float]:
    seed_noise(seed, step, slot)
    return torch.rand(4).tolist()


def test_noise_depends_on_seed_step_and_slot_alone() -> None:
    first = drawn(1, 2, 3)
    torch.rand(17)
    assert drawn(1, 2, 3) == first
    assert all(drawn(*key) != first for key in [(0, 2, 3), (1, 0, 3), (1, 2, 0), (1, 23, 0), (12, 3, 0), (3, 2, 1)])


def test_noise_is_the_same_in_another_process() -> None:
    code = "import torch; from mistral_dist.runtime.engine import seed_noise; seed_noise(1, 2, 3); print(torch.rand(4).tolist())"
    other = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": "7"}, cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert other.stdout.splitlines()[-1] == str(drawn(1, 2, 3))


# processes


def test_a_process_is_alive_until_it_is_dead() -> None:
    code = "from mistral_dist.runtime.process import identity; print(identity(), flush=True); input()"
    other = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None
        identity = other.stdout.readline().strip()
        assert identity.startswith(f"{other.pid}:")
        assert process.is_alive(identity)
        other.kill()
        while psutil.Process(other.pid).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
        assert not process.is_alive(identity), "a zombie does nothing any more"
    finally:
        other.kill()
        other.communicate()
    assert not process.is_alive(identity)


def test_this_process_is_alive_and_another_with_its_pid_is_not_it() -> None:
    assert process.is_alive(process.identity())
    assert not process.is_alive(f"{os.getpid()}:1.00")


@pytest.mark.parametrize("identity", ["", "x", "12:", ":1.0", "x:1.0", "-5:1.0", f"{2**22 + 1}:1.00", f"{10**30}:1.0"])
def test_what_is_no_process_is_not_alive(identity: str) -> None:
    assert not process.is_alive(identity)


def test_what_the_user_has_set_in_the_environment_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MISTRAL_TEST_A", "theirs")
    monkeypatch.setenv("MISTRAL_TEST_B", "")
    monkeypatch.delenv("MISTRAL_TEST_B")
    process.default_environment(MISTRAL_TEST_A="ours", MISTRAL_TEST_B="ours")
    assert process.environment("MISTRAL_TEST_A") == "theirs"
    assert process.environment("MISTRAL_TEST_B") == "ours"
    assert process.environment("MISTRAL_TEST_C", "none") == "none"


# signals


@pytest.fixture
def terminal() -> Iterator[None]:
    """Signals as under a terminal, also where the tests themselves run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", process.STOP_SIGNALS)
@pytest.mark.usefixtures("terminal")
def test_a_stop_signal_is_remembered(number: signal.Signals) -> None:
    with StopRequest() as stop:
        assert stop.signal is None
        os.kill(os.getpid(), number)
        assert stop.signal is number


@pytest.mark.usefixtures("terminal")
def test_under_nohup_a_terminal_may_close() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.signal is None
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_the_first_signal_is_the_one_that_counts() -> None:
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal is signal.SIGUSR1


@pytest.mark.usefixtures("terminal")
def test_the_handlers_that_were_there_are_there_again() -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _frame: heard.append(number))
    try:
        handlers = [signal.getsignal(number) for number in process.STOP_SIGNALS]
        with StopRequest() as stop:
            assert not set(handlers) & {signal.getsignal(number) for number in process.STOP_SIGNALS}
        assert [signal.getsignal(number) for number in process.STOP_SIGNALS] == handlers
        os.kill(os.getpid(), signal.SIGUSR1)
        assert heard == [signal.SIGUSR1]
        assert stop.signal is None
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_entered_twice_it_still_puts_back_what_was_there_first() -> None:
    handlers = [signal.getsignal(number) for number in process.STOP_SIGNALS]
    stop = StopRequest().__enter__()
    os.kill(os.getpid(), signal.SIGTERM)
    with stop:
        assert stop.signal is signal.SIGTERM, "what came early is remembered"
    assert [signal.getsignal(number) for number in process.STOP_SIGNALS] == handlers


# the launcher's line


def test_a_line_can_be_typed_as_it_is_shown() -> None:
    line = Line(Path("configs/my accelerate.yaml"), "mistral_dist.train", ("r.yaml", "task.prompt=a b"), 2, deepspeed=Path("zero2.json"))
    assert str(line) == (
        "accelerate launch --config_file 'configs/my accelerate.yaml' --num_processes 2 --deepspeed_config_file zero2.json"
        " --main_process_port 0 -m mistral_dist.train r.yaml 'task.prompt=a b'"
    )
    assert shlex.split(str(line)) == ["accelerate", "launch", *line.arguments()]


def test_a_line_without_zero_names_no_deepspeed() -> None:
    assert "deepspeed" not in str(Line(Path("c.yaml"), "mistral_dist.train", ("r.yaml",), 1))


def test_a_line_is_one_that_accelerate_understands() -> None:
    from accelerate.commands.launch import launch_command_parser

    line = Line(Path("c.yaml"), "mistral_dist.train", ("r.yaml", "a.b=1"), 3, deepspeed=Path("z.json"))
    found = launch_command_parser().parse_args(line.arguments())
    assert (found.config_file, found.num_processes, found.deepspeed_config_file, found.main_process_port) == ("c.yaml", 3, "z.json", 0)
    assert (found.module, found.training_script, found.training_script_args) == (True, "mistral_dist.train", ["r.yaml", "a.b=1"])


def test_threads_are_shared_out_and_never_none() -> None:
    cores = len(os.sched_getaffinity(0))
    assert threads_per_process(1) == cores
    assert threads_per_process(10 * cores) == 1
