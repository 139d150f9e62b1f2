"""The ranks: devices, preparing the model, backward, reductions.

Accelerate starts the process group and, where `accelerate launch` says so, wraps the model in DeepSpeed ZeRO; otherwise, in plain
data parallelism, the gradients are exchanged here. The rooms above see one interface; which of the two is behind it shows nowhere.
"""

import datetime
import math
import random
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, GradientAccumulationPlugin, InitProcessGroupKwargs

from mistral_dist.config import Recipe
from mistral_dist.errors import MistralDistError, RunError, TrainingError
from mistral_dist.runtime import process, shards
from mistral_dist.runtime.control import Control, Deadline
from mistral_dist.runtime.drift import drift
from mistral_dist.runtime.memory import Scene, explanation, is_out_of_memory, standing
from mistral_dist.runtime.pace import Pace
from mistral_dist.runtime.watch import ENOUGH, ONLY_WAITING, Place, Watch, board
from mistral_dist.runtime.zero import accumulation_steps, deepspeed_config, offloads, wait_as_long, without_compiled_collectives

T = TypeVar("T")

TIMEOUT = datetime.timedelta(minutes=10)
"""A collective that waits longer than this has lost a rank; longer still where train.stall_seconds is, which names it first."""


class Runtime:
    """One rank among its peers."""

    def __init__(self, recipe: Recipe | None = None, stop: process.StopRequest | None = None) -> None:
        """Join the other ranks; with a recipe, to train it, until `stop`. Raises RecipeError or MachineError for what cannot be."""
        process.die_with_launcher()
        self.world_size = int(process.environment("WORLD_SIZE", "1"))
        self.rank = int(process.environment("RANK", "0"))
        has_gpu = torch.cuda.is_available()
        zero, accumulation = None, 1
        if recipe is not None:
            accumulation = accumulation_steps(recipe, self.world_size)
            zero = deepspeed_config(recipe, self.world_size)
            if recipe.train.deterministic:
                _make_deterministic()
            if zero and not has_gpu:
                without_compiled_collectives()
        grouped = zero is not None or self.world_size > 1
        self.deepspeed = zero or {}
        """DeepSpeed's configuration, without its "auto"; empty without ZeRO."""
        self._accumulation = accumulation
        self._max_grad_norm = recipe.optim.max_grad_norm if recipe else 1.0
        self._accelerator = Accelerator(
            cpu=not has_gpu and zero is None,
            # the precision is the model's own affair (model.py): no engine casts anything
            mixed_precision="no",
            deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=zero) if zero else None,
            # whole windows only, and read ahead: the end of a data loader must not force a step of its own
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=accumulation, sync_with_dataloader=False),
            # without a named backend Accelerate takes a CPU rank under DeepSpeed for a lone process; a process that is
            # alone it would make wait for a group
            kwargs_handlers=[InitProcessGroupKwargs(backend="nccl" if has_gpu else "gloo", timeout=_patience(recipe))] if grouped else [],
        )
        if self._accelerator.num_processes != self.world_size:
            raise TrainingError(
                f"joined {self._accelerator.num_processes} of {self.world_size} ranks; are the versions those of constraints.txt?"
            )
        self.device = self._accelerator.device
        self.model: Any = None
        self._optimizer: Any = None
        self._grad_norm = 0.0
        self.place = Place()
        self._arrived = time.monotonic()
        self._save_seconds: float | None = None
        self.is_writing: Callable[[], bool] = lambda: False
        """Whether a checkpoint of this rank is on its way to the disk, for which the last one will have to wait."""
        self._pace = Pace(self.device)
        self.packs: Sequence[int] = ()
        """Tokens of each pack in the forward at hand; for what is said where memory runs out."""
        self._recipe = recipe
        self._watch: Watch | None = None
        deadline = Deadline(process.launched(), recipe.train.max_seconds if recipe else None)
        self._control = Control(self.world_size, stop or process.StopRequest(), deadline, _patience(recipe))

    def at(self, phase: str, step: int | None = None, micro: int | None = None) -> None:
        """Note where this rank stands now; for the watch. Every rank makes the same calls in the same order."""
        now = time.monotonic()
        if self.place.phase == "saving":
            if not self.is_writing():  # else that was the gather alone, and the writer will say how long all of it took
                self.note_save(now - self._arrived)
            self._control.deadline.rest()
        self._arrived = now
        self.place = Place(self.place.moves + 1, phase, step, micro)

    def note_save(self, seconds: float) -> None:
        """How long a save took: the longest is what train.max_seconds keeps for the last one. `at("saving")` is noted by itself."""
        self._save_seconds = max(seconds, self._save_seconds or 0.0)

    def refuse_drift(self, facts: Mapping[str, str]) -> None:
        """Raise RunError, the same on every rank, where a rank knows other facts than the rest. A collective."""
        everywhere = self.gather((dict(facts), socket.gethostname()))
        found = drift([of_rank for of_rank, _ in everywhere], [host for _, host in everywhere])
        if found is not None:
            raise RunError(f"the ranks are not alike: {found}; make them the same on all machines")

    def agree_to_go_on(self) -> None:
        """Where nothing is half done. Raises StopAgreed where any rank was asked to stop. A collective, which waits."""
        self._control.agree(self._save_seconds, 1 + self.is_writing())

    def is_asked(self) -> bool:
        """Whether this rank, for itself, is asked to stop. What to do about it all agree on elsewhere."""
        return self._control.is_asked(self._save_seconds, 1 + self.is_writing())

    def check_stop(self) -> None:
        """Where ranks work without exchanging anything: before each forward and backward, between two batches of an evaluation.

        Raises StopAgreed where any rank was asked before it last came here. Waits for nobody who is less than one call behind.
        """
        self._control.check(self._save_seconds, 1 + self.is_writing())

    def watch(self, stall_seconds: float | None, stacks: Path, report: Callable[[str], None], say: Callable[[str], None]) -> None:
        """Look after the other ranks from now on, and be looked after; see watch.py."""
        if stall_seconds is not None and self.world_size > 1:
            self._watch = Watch(
                self.rank, self.world_size, board(), stall_seconds,
                place=lambda: self.place, pace=lambda: self._pace.median(ENOUGH), stacks=stacks, report=report, say=say,
            )  # fmt: skip

    @property
    def zero_stage(self) -> int:
        """1, 2 or 3; 0 without ZeRO."""
        return int(self.deepspeed["zero_optimization"]["stage"]) if self.deepspeed else 0

    @property
    def is_offloaded(self) -> bool:
        """Whether the optimizer's state is in the machine's own memory."""
        return bool(self.deepspeed) and offloads(self.deepspeed["zero_optimization"])

    @property
    def sharding(self) -> str:
        """How the state is shared out, in words."""
        return f"ZeRO {self.zero_stage}{' with optimizer offload' if self.is_offloaded else ''}"

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the one that writes."""
        return self.rank == 0

    def settle(self, recipe: Recipe) -> None:
        """Take the recipe with the number that stands for `train.micro_batch_size: auto`; before `prepare`. Raises MachineError."""
        self._recipe, self._accumulation = recipe, accumulation_steps(recipe, self.world_size)
        self._accelerator.gradient_accumulation_steps = self._accumulation
        zero = deepspeed_config(recipe, self.world_size) or {}
        for key in zero.keys() & {"train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size"}:
            self._accelerator.deepspeed_plugin.deepspeed_config[key] = zero[key]

    def prepare(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Wrap model and optimizer, shard them where ZeRO does. The adapter must already hold the values to go on from."""
        if self.zero_stage:
            self.model, wrapped = self._accelerator.prepare(model, optimizer)
            wait_as_long(_patience(self._recipe))
        else:
            # unwrapped: the gradients are exchanged once a step, in `finish_step`
            self.model = self._accelerator.prepare_model(model, evaluation_mode=True)
            wrapped = self._accelerator.prepare_optimizer(optimizer)
        self._optimizer = wrapped.optimizer
        shards.create_state(self._optimizer, 0)

    @property
    def bare_model(self) -> Any:
        """The model without its wrappers."""
        return self._accelerator.unwrap_model(self.model)

    def set_learning_rate(self, rate: float) -> None:
        """For the coming step."""
        for group in self._optimizer.param_groups:
            group["lr"] = rate

    @contextmanager
    def micro_step(self, step: int, micro: int, packs: Sequence[int]) -> Iterator[None]:
        """Around the forward and backward of one micro-batch: gradients are exchanged once a step (under ZeRO-2 and 3 at each).

        `step` and `micro` count from 1; `packs`: tokens of each pack in it, none for an empty one. Raises StopAgreed where any
        rank was asked to stop: then the step is not made, what it has accumulated counts for nothing, and it is done again.
        """
        self.check_stop()
        self.at("forward", step, micro)
        self.packs = packs
        if packs:
            self._pace.begin()
        with self._accelerator.accumulate(self.model):
            yield
        self.at("between micro-steps", step, micro)

    def backward(self, loss: torch.Tensor) -> None:
        """Back-propagate a loss that is already divided by the global number of targets.

        Accelerate, or the DeepSpeed engine, divides by the accumulation count, and gradients are averaged over ranks.
        Those two divisions are undone here, and nowhere else. Under DeepSpeed the last call of a step also clips,
        updates and zeroes.
        """
        self._pace.end()
        self.check_stop()
        self.at("backward", self.place.step, self.place.micro)
        self._accelerator.backward(loss * (self.world_size * self._accumulation))

    def finish_step(self) -> float:
        """Clip, update, zero; return the gradient's global L2 norm before clipping.

        Where that is not finite there is no update, on any rank: neither adapter nor moments change. DeepSpeed does so by
        itself for an engine that is not in bfloat16, which ours never is (tests/dist/test_guards.py).
        """
        if self.zero_stage:
            return float(self.model.get_global_grad_norm())
        if self.world_size > 1:
            shards.average_gradients(list(self._trainable().values()), self.world_size)
        norm = float(self._accelerator.clip_grad_norm_(self.bare_model.parameters(), self._max_grad_norm))
        if math.isfinite(norm):
            self._optimizer.step()
        self._optimizer.zero_grad()
        return norm

    def sum(self, values: Sequence[float]) -> list[float]:
        """Each value summed over all ranks, in float64."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.world_size > 1:
            torch.distributed.all_reduce(total)
        return total.tolist()

    def gather(self, value: Any) -> list[Any]:
        """The value of each rank, in rank order, on every rank. For small Python objects."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(values, value)
        return values

    def on_main(self, action: Callable[[], T]) -> T:
        """Do something on rank 0 while the others wait; its result, or the error it raised, is everybody's."""
        return _told(self.gather(_tried(action) if self.is_main else None)[0])

    def on_each_machine(self, action: Callable[[], T]) -> T:
        """Do something on the first rank of each machine while the others wait; its result, or the error it raised, is that of them all."""
        machine, is_first = process.environment("GROUP_RANK", "0"), process.environment("LOCAL_RANK", "0") == "0"
        everywhere = self.gather((machine, _tried(action) if is_first else None))
        outcomes = {where: outcome for where, outcome in everywhere if outcome is not None}
        failed = [outcome for outcome in outcomes.values() if outcome[1] is not None]
        return _told(failed[0] if failed else outcomes[machine])

    def gather_adapter(self) -> dict[str, torch.Tensor]:
        """The trainable parameters by name, whole, float32, on the CPU; only on rank 0. A collective."""
        whole = ((name, shards.gather_parameter(parameter)) for name, parameter in self._trainable().items())
        return self._kept_on_main(whole)

    def gather_moments(self) -> dict[str, torch.Tensor]:
        """AdamW's moments by `parameter.moment`, whole, float32, on the CPU; only on rank 0. A collective."""
        return self._kept_on_main(shards.gather_moments(self._trainable(), self._optimizer))

    def scatter_adapter(self, adapter: Mapping[str, torch.Tensor]) -> None:
        """Put back gathered trainable parameters, in the middle of a run. A collective."""
        shards.scatter_parameters(self._trainable(), self._optimizer, adapter)

    def scatter_moments(self, moments: dict[str, torch.Tensor], updates: int) -> None:
        """Put back gathered moments and the number of updates made, on any number of ranks."""
        shards.scatter_moments(self._trainable(), self._optimizer, moments, updates)

    def byte_sum(self, parameters: Sequence[torch.nn.Parameter]) -> int:
        """The sum of all bytes of tensors that may be sharded: equal before and after sharding unless bytes changed.

        A collective once the model is prepared under ZeRO-3, when every rank holds a part.
        """
        own = (shards.own_elements(parameter, self.rank) for parameter in parameters)
        here = sum(int(part.contiguous().view(torch.uint8).sum(dtype=torch.int64)) for part in own)
        is_split = any(hasattr(parameter, "ds_tensor") for parameter in parameters)
        return sum(self.gather(here)) if is_split else here

    def refuse_unsharded(self, frozen: Sequence[Any]) -> None:
        """Under ZeRO-3, raise TrainingError unless this rank holds its part of the frozen parameters only.

        Measured on what is allocated. The small ones that DeepSpeed keeps whole on purpose do not count; 10 % is for padding.
        """
        if self.zero_stage < 3 or self.world_size == 1:
            return
        held, whole = shards.held_bytes(parameter for parameter in frozen if not getattr(parameter, "ds_persist", False))
        worst = max(self.gather(held))
        if worst > 1.1 * whole / self.world_size:
            raise TrainingError(
                f"ZeRO-3 did not shard the base: a rank holds {worst:,} of its {whole:,} bytes, {self.world_size} ranks"
                f" should hold some {whole // self.world_size:,} each; use the versions of constraints.txt, or ZeRO-2"
            )

    def memory_bytes(self) -> int:
        """Peak memory of this rank so far: the GPU's allocator, or the process's resident set."""
        if self.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self.device))
        return process.peak_resident_bytes()

    def memory_parts(self) -> dict[str, int]:
        """Bytes of this rank that stay from step to step, by part; gradients only while there are any."""
        return standing(self.model, self._optimizer, self.device)

    def explain(self, error: Exception) -> Exception:
        """An error that says what to do, for one that says that memory was refused; any other as it is."""
        if self._recipe is None or not is_out_of_memory(error):
            return error
        is_gpu = self.device.type == "cuda"
        scene = Scene(
            rank=self.rank,
            host=socket.gethostname(),
            place=str(self.place),
            what="GPU memory" if isinstance(error, torch.OutOfMemoryError) else "memory",
            peak=self.memory_bytes(),
            capacity=torch.cuda.get_device_properties(self.device).total_memory if is_gpu else None,
            parts=self.memory_parts(),
            packs=self.packs,
        )
        return TrainingError(explanation(scene, self._recipe))

    def close(self) -> None:
        """Leave the group; ranks that have finished wait here for those that have not."""
        self._control.finish()
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
            if self._watch is not None:
                self._watch.close()
            torch.distributed.destroy_process_group()

    def _kept_on_main(self, tensors: Iterator[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        return {name: tensor for name, tensor in tensors if self.is_main}

    def _trainable(self) -> dict[str, torch.nn.Parameter]:
        return {name: p for name, p in self.bare_model.named_parameters() if p.requires_grad}


def _tried(action: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """What an action returned, or the error it raised, in a shape that can be sent to other ranks."""
    try:
        return action(), None
    except (MistralDistError, OSError) as error:
        return None, error
    except Exception as error:
        # whatever it is (a library's own kind may not even pickle), the other ranks must not wait for it
        return None, TrainingError(f"{type(error).__name__}: {error}")


def _told(outcome: tuple[Any, Exception | None]) -> Any:
    result, problem = outcome
    if problem is not None:
        raise problem
    return result


def _patience(recipe: Recipe | None) -> datetime.timedelta:
    """How long ranks wait for each other in a collective."""
    stall = recipe.train.stall_seconds if recipe is not None else None
    return max(TIMEOUT, datetime.timedelta(seconds=ONLY_WAITING * (stall or 0.0)))


def seed_noise(seed: int, step: int, slot: int) -> None:
    """Seed what is random in one micro-batch (LoRA dropout): the same wherever and whenever the slot is computed."""
    mixed = random.Random(f"{seed}/{step}/{slot}").getrandbits(63)
    torch.manual_seed(mixed)


def _make_deterministic() -> None:
    """Only kernels that give the same bits each time (a no-op on the CPU, where the ones used here all do)."""
    process.default_environment(CUBLAS_WORKSPACE_CONFIG=":4096:8", FLASH_ATTENTION_DETERMINISTIC="1")
    torch.use_deterministic_algorithms(True, warn_only=False)
    torch.backends.cudnn.benchmark = False
