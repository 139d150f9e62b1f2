"""`train.micro_batch_size: auto` in a real run: the largest that fits, agreed by all ranks; to the bit the run with that number."""

from pathlib import Path

import pytest

from mistral_dist.config import Recipe, changed_fields
from tests import faults
from tests.conftest import WriteRecipe
from tests.dist.test_resume import assert_same_run
from tests.launch import mistral_dist, train

LENGTH = 192


@pytest.mark.parametrize(
    ("processes", "zero", "room", "found"),
    [
        # of 12 packs, each rank has 6: 2, 4 and 6 are tried
        pytest.param(2, 3, {"0": 6 * LENGTH, "1": 3 * LENGTH}, 2, id="ZeRO-3 x 2, less on one rank"),
        pytest.param(2, 2, {"0": 3 * LENGTH, "1": 5 * LENGTH}, 2, id="ZeRO-2 x 2", marks=pytest.mark.matrix),
        pytest.param(2, 1, {"0": 3 * LENGTH, "1": 6 * LENGTH}, 2, id="ZeRO-1 x 2, less on one rank", marks=pytest.mark.matrix),
        pytest.param(2, 0, {"0": 5 * LENGTH, "1": 6 * LENGTH}, 4, id="two processes", marks=pytest.mark.matrix),
        pytest.param(1, 0, {"0": 11 * LENGTH}, 8, id="one process", marks=pytest.mark.matrix),
    ],
)
@pytest.mark.fault("memory refused to a trial of train.micro_batch_size: auto, on one rank", "all take what fits; the bits of that number")
def test_the_largest_that_fits_is_taken_and_changes_no_bit(
    processes: int, zero: int, room: dict[str, int], found: int, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    """The fault refuses larger forwards in the steps, too: a size that is too large would end the run."""
    recipe = write_recipe(
        data={"max_length": LENGTH},
        lora={"lora_dropout": 0.1},
        model={"dtype": "bfloat16"},
        train={"steps": 4, "global_batch_size": 12, "gradient_checkpointing": zero == 3},
        checkpoint={"save_steps": 2},
    )
    assert mistral_dist("prepare", recipe).returncode == 0
    limited = faults.environment(memory=room)
    run = train(recipe, tmp_path / "auto", "train.micro_batch_size=auto", processes=processes, zero=zero, **limited)
    log = (run / "log.txt").read_text()
    assert f"train.micro_batch_size=auto: {found}, tried with full packs of {LENGTH} tokens; " in log
    refused = {2: f"4 do not fit on rank {1 if zero == 3 else 0}", 4: "6 do not fit on rank 0", 8: "12 do not fit"}
    assert refused[found] in log
    written = train(recipe, tmp_path / "written", f"train.micro_batch_size={found}", processes=processes, zero=zero, **limited)
    assert_same_run(run, written, last=4)
    assert Recipe.load(run / "recipe.yaml").train.micro_batch_size == "auto", "what the user wrote"


def test_on_a_cpu_auto_is_one(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    recipe = write_recipe(train={"steps": 2, "global_batch_size": 2, "micro_batch_size": "auto"})
    run = train(recipe, tmp_path / "run", processes=1, zero=0)
    assert "train.micro_batch_size=auto: 1, since on a CPU memory cannot be refused in time" in (run / "log.txt").read_text()
    assert not changed_fields(Recipe.load(recipe), Recipe.load(recipe, ["train.micro_batch_size=2"])), "a number may take its place"
