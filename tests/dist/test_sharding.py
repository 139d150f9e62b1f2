"""ZeRO-3 shards the frozen base for real: measured on two real ranks, and refused where it does not."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import WriteRecipe
from tests.launch import LIMIT, ROOT

WORKER = """
import datetime
import sys
import torch
from mistral_dist.config import Recipe
from mistral_dist.errors import TrainingError
from mistral_dist.model import adapter_parameters, build_trainable, packed_weights
from mistral_dist.optim import build_optimizer
from mistral_dist.runtime import shards
from mistral_dist.runtime.engine import Runtime
from mistral_dist.runtime.process import quiet_libraries

quiet_libraries()
recipe = Recipe.load(sys.argv[1])
runtime = Runtime(recipe)
model = build_trainable(recipe, runtime.device, "sdpa")
if sys.argv[2] == "bytes":
    for packed in packed_weights(model):
        packed.data = packed.data.view(torch.uint8)
runtime.prepare(model, build_optimizer(list(adapter_parameters(model).values()), recipe.optim, fused=False))
frozen = [p for p in runtime.bare_model.parameters() if not p.requires_grad]
if sys.argv[2] == "whole":
    import deepspeed
    deepspeed.zero.GatheredParameters(frozen).__enter__()
groups = torch.distributed.distributed_c10d._world.pg_map
waits = {group._get_backend(torch.device("cpu")).options._timeout for group in groups}
assert len(groups) >= 2 and waits == {datetime.timedelta(minutes=25)}, (waits, "five times train.stall_seconds")
held, whole = shards.held_bytes(p for p in frozen if not getattr(p, "ds_persist", False))
try:
    runtime.refuse_unsharded(frozen)
    refused = "accepted"
except TrainingError as error:
    refused = str(error)
if runtime.is_main:
    print(f"{held / whole:.3f} of {whole} bytes; {refused}", flush=True)
runtime.close()
"""


@pytest.mark.parametrize(
    ("fault", "share", "said"),
    [
        ("none", "0.500 of", "accepted"),
        ("whole", "1.500 of", "ZeRO-3 did not shard the base: a rank holds "),
        pytest.param("bytes", "0.500 of", "accepted", marks=pytest.mark.matrix),
    ],
)
def test_each_rank_holds_its_part_of_the_base(write_recipe: WriteRecipe, tmp_path: Path, fault: str, share: str, said: str) -> None:
    """With the fault, every rank has also allocated all of it. Packed weights that are stored as bytes are sharded, too."""
    (tmp_path / "worker.py").write_text(WORKER)
    recipe = write_recipe()
    line = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", "configs/accelerate/multi_gpu.yaml"]
    line += ["--num_processes", "2", "--deepspeed_config_file", "configs/deepspeed/zero3.json", "--main_process_port", "0"]
    done = subprocess.run(
        [*line, str(tmp_path / "worker.py"), str(recipe), fault], cwd=ROOT, capture_output=True, text=True, timeout=LIMIT, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"; {said}" in done.stdout and done.stdout.startswith(share), done.stdout
