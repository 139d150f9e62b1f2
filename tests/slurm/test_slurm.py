"""slurm/train.sh, as it is, on a real SLURM of two nodes: whatever the scheduler does, the run ends as if it had not.

Each node has one CPU process; ZeRO-2 shards over the two.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import faults
from tests.conftest import WriteRecipe
from tests.dist.test_resume import assert_nobody_left, assert_same_run
from tests.launch import COMMAND, ROOT, lines, losses_so_far, mistral_dist, status, train
from tests.slurm.cluster import Cluster, missing, running, waited

STEPS = 20
SCRIPT = ROOT / "slurm/train.sh"
SLOWLY = faults.environment(slow={"0": 0.25, "1": 0.25})
"""Each forward takes so long that there is time for what the scheduler does, without work for the processor."""
PAST = 3
"""Steps after which it does it."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    why = missing()
    if why is not None:
        pytest.skip(why)
    with running(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def recipe(recipe_writer: Callable[[Path], WriteRecipe], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 steps of 2 micro-steps on two ranks, in bfloat16, a checkpoint every fifth, prepared."""
    write = recipe_writer(tmp_path_factory.mktemp("recipe"))
    recipe = write(model={"dtype": "bfloat16"}, train={"epochs": 4, "steps": STEPS, "global_batch_size": 4})
    assert mistral_dist("prepare", recipe).returncode == 0
    return recipe


@pytest.fixture(scope="module")
def undisturbed(recipe: Path) -> Path:
    """The same run without SLURM, on two processes of one machine."""
    return train(recipe, recipe.parent / "undisturbed")


@pytest.fixture
def submit(cluster: Cluster, recipe: Path, tmp_path: Path) -> Callable[..., tuple[str, Path]]:
    """Submits the recipe; gives the job's id and the run's directory. A second time it is the same run."""
    site = tmp_path / "site.env"
    site.write_text(f'PATH="{Path(sys.executable).parent}:$PATH"\n')

    def submit(*words: str, **more: str) -> tuple[str, Path]:
        run = tmp_path / "run"
        job = cluster.submit(
            "--nodes=2", f"--output={tmp_path}/job-%j.log", *words, SCRIPT, recipe, f"run.dir={run}", "--processes", "1",
            SITE_ENV=str(site), **{**SLOWLY, **more},
        )  # fmt: skip
        return job, run

    return submit


def made(run: Path) -> int:
    return len(losses_so_far(run)) if (run / "metrics.jsonl").is_file() else 0


def log_of(run: Path, job: str) -> str:
    return (run.parent / f"job-{job}.log").read_text()


def assert_finished(cluster: Cluster, job: str, run: Path, undisturbed: Path, restarts: int) -> None:
    found = cluster.wait_for(job, "COMPLETED")
    assert (found["ExitCode"], found["Restarts"]) == ("0:0", str(restarts)), log_of(run, job)
    assert_nobody_left(run)
    assert status(run)["state"] == "finished"
    assert [entry["step"] for entry in lines(run / "data_order.jsonl")] == list(range(1, STEPS + 1)), "each step once"
    assert_same_run(run, undisturbed)


def test_a_run_of_two_nodes(cluster: Cluster, recipe: Path, undisturbed: Path, tmp_path: Path) -> None:
    """Submitted without a word of the environment: what a job needs is in the site.env of the folder that it is submitted from."""
    run, site = tmp_path / "run", tmp_path / "slurm" / "site.env"
    site.parent.mkdir()
    threads = os.environ["OMP_NUM_THREADS"]  # as many as undisturbed: on some processors the bits depend on it
    known = {
        "PATH": f"{Path(sys.executable).parent}:$PATH",
        "OMP_NUM_THREADS": threads,
        **{name: value.replace('"', '\\"') for name, value in SLOWLY.items()},
    }
    site.write_text("".join(f'{name}="{value}"\n' for name, value in known.items()) + "[[ -d /nowhere ]] && HF_HOME=/nowhere\n")
    words = ["--nodes=2", "--export=NONE", f"--output={tmp_path}/job-%j.log", SCRIPT, recipe, f"run.dir={run}", "--processes", "1"]
    job = cluster.submit(*words, cwd=tmp_path)
    waited(lambda: made(run) >= 1, 120, lambda: log_of(run, job))
    told = mistral_dist("status", run, **cluster.environment).stdout
    assert f"SLURM {job}: RUNNING on n[1-2]" in told
    assert_finished(cluster, job, run, undisturbed, restarts=0)
    log = log_of(run, job)
    assert "node 0 of 2, which meet at" in log
    assert "node 1 of 2, which meet at" in log
    assert "which meet at n1, port" in log or "which meet at 127.0.0.1, port" in log, "the first node, or where srun is"
    assert log.count("--machine_rank 1") == log.count("--machine_rank 0") == 1
    assert (run / "log-node1.txt").is_file()


def down(cluster: Cluster, job: str) -> None:
    """A node is lost, and comes back when the job has been taken from it."""
    cluster.call("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=test")
    waited(lambda: cluster.job(job)["Restarts"] == "1", 60)
    cluster.call("scontrol", "update", "NodeName=n2", "State=RESUME")


def preempt(cluster: Cluster, job: str) -> None:
    """A job of a partition that goes first wants both nodes."""
    other = cluster.submit("--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    cluster.wait_for(other, "COMPLETED")
    assert cluster.job(job)["Restarts"] == "1"


def signal(cluster: Cluster, job: str) -> None:
    cluster.call("scancel", "--signal=USR1", job)


@pytest.mark.parametrize("happens", [preempt, *(pytest.param(event, marks=pytest.mark.matrix) for event in (signal, down))])
def test_whatever_happens_it_goes_on_by_itself(
    happens: Callable[[Cluster, str], None],
    cluster: Cluster,
    submit: Callable[..., tuple[str, Path]],
    undisturbed: Path,
    tmp_path: Path,
) -> None:
    follow = [*COMMAND, "status", str(tmp_path / "run"), "--follow"]
    with subprocess.Popen(follow, cwd=ROOT, env=dict(cluster.environment), stdout=subprocess.PIPE, text=True) as following:
        job, run = submit()
        waited(lambda: made(run) >= PAST, 120, lambda: log_of(run, job))
        happens(cluster, job)
        assert_finished(cluster, job, run, undisturbed, restarts=1)
        shown = following.communicate(timeout=60)[0]
    assert "nothing there yet; waiting for it to begin" in " ".join(shown.split())
    assert re.search(r"state\s+finished", shown), "it stayed through the queue"
    assert status(run)["launches"] == 2
    told = (run / "log.txt").read_text()
    assert "going on from checkpoint-" in told
    assert happens is down or "stopping on request" in told, "a node that is lost may not be able to save"


def test_before_its_time_limit_it_saves_and_goes_on(cluster: Cluster, submit: Callable[..., tuple[str, Path]], undisturbed: Path) -> None:
    """A turn has one minute before the signal, or less, since that may come early; the steps alone sleep for 80 seconds."""
    job, run = submit("--time=2", "--signal=B:USR1@60", **faults.environment(slow={"0": 2.0, "1": 2.0}))
    found = cluster.wait_for(job, "COMPLETED", seconds=600)
    restarts = int(found["Restarts"])
    assert restarts >= 1, "it was faster than its limit; this machine needs more steps"
    assert_finished(cluster, job, run, undisturbed, restarts)
    assert log_of(run, job).count("USR1: the run is asked to save and stop") >= restarts, "once more, where it came to the finished run"
    assert 2 <= status(run)["launches"] <= restarts + 1, "a turn that is over while it is loading does not count"
    assert "stopping on request (SIGUSR1)" in (run / "log.txt").read_text()


def test_cancelled_it_stays_stopped_until_it_is_submitted_again(
    cluster: Cluster, submit: Callable[..., tuple[str, Path]], undisturbed: Path
) -> None:
    job, run = submit()
    waited(lambda: made(run) >= PAST, 120, lambda: log_of(run, job))
    cluster.call("scancel", job)
    found = cluster.wait_for(job, "CANCELLED")
    waited(lambda: "COMPLETING" not in cluster.call("squeue", "-h", "-j", job, "-t", "all", "-o", "%T"), 60)
    assert found["Restarts"] == "0"
    assert_nobody_left(run)
    stopped = status(run)
    assert (stopped["state"], stopped["exit_code"]) == ("stopped", 85), stopped
    assert stopped["step"] >= PAST
    again, _ = submit()
    assert_finished(cluster, again, run, undisturbed, restarts=0)


@pytest.mark.matrix
def test_a_job_that_may_go_on_no_more_says_so(cluster: Cluster, submit: Callable[..., tuple[str, Path]], undisturbed: Path) -> None:
    job, run = submit(MAX_RESTARTS="0")
    waited(lambda: made(run) >= 1, 120, lambda: log_of(run, job))
    signal(cluster, job)
    found = cluster.wait_for(job, "FAILED")
    assert (found["ExitCode"], found["Restarts"]) == ("85:0", "0")
    assert "went back into the queue 0 times (MAX_RESTARTS); submit the same line again to go on" in log_of(run, job)
    assert status(run)["state"] == "stopped"


def test_a_finished_run_is_not_submitted_and_is_evaluated(cluster: Cluster, recipe: Path, undisturbed: Path, tmp_path: Path) -> None:
    site = tmp_path / "site.env"
    site.write_text(f'PATH="{Path(sys.executable).parent}:$PATH"\n')
    done = submit_by_hand(cluster, recipe, site, f"run.dir={undisturbed}")
    assert done.returncode == 2
    assert "is finished, so there is nothing to start a job for" in done.stderr.splitlines()[-1]
    shutil.rmtree(undisturbed / "evaluation", ignore_errors=True)
    words = [SCRIPT.with_name("evaluate.sh"), undisturbed, "--processes", "2"]
    job = cluster.submit(f"--output={tmp_path}/job-%j.log", *words, SITE_ENV=str(site))
    found = cluster.wait_for(job, "COMPLETED")
    assert found["ExitCode"] == "0:0", (tmp_path / f"job-{job}.log").read_text()
    assert "accuracy" in (undisturbed / "evaluation/test.json").read_text()
    for run, told in ((tmp_path / "nothing", "no run there"), (undisturbed, "is part of what was trained")):
        more = ["lora.r=3"] if run == undisturbed else []
        words = [SCRIPT.with_name("evaluate.sh"), run, *more]
        done = subprocess.run(
            words, env={**cluster.environment, "SITE_ENV": str(site)}, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 2
        (line,) = done.stderr.splitlines()
        assert told in line


def test_a_model_is_served_by_a_job_that_says_where(cluster: Cluster, undisturbed: Path, tmp_path: Path) -> None:
    """A stand-in for vLLM answers; real engines are started by `make serve-test`."""
    engine, site = tmp_path / "vllm", tmp_path / "site.env"
    engine.write_text('#!/bin/sh\necho "key $VLLM_API_KEY"; for word; do echo "word $word"; done\n')
    engine.chmod(0o755)
    site.write_text(f'PATH="{Path(sys.executable).parent}:$PATH"\nMISTRAL_DIST_ENGINE={engine}\n')
    words, environment = [SCRIPT.with_name("serve.sh"), undisturbed], {**cluster.environment, "SITE_ENV": str(site)}
    for more, told in (
        ({}, "others could use the model without a key"),
        ({"VLLM_API_KEY": "k", "MISTRAL_DIST_ENGINE": "x"}, "served on the base"),
    ):
        done = subprocess.run(words, cwd=tmp_path, env={**environment, **more}, capture_output=True, text=True, timeout=120, check=False)
        assert told in done.stdout + done.stderr
        assert done.returncode == (0 if more else 2), done.stdout + done.stderr
    job = done.stdout.split()[-1]
    found = cluster.wait_for(job, "COMPLETED")
    said = (tmp_path / f"slurm-{job}.log").read_text().splitlines()
    assert found["ExitCode"] == "0:0", said
    port = 20000 + int(job) % 20000
    assert [line for line in said if line.endswith(f":{port}/v1") and line.startswith("http://")], said
    assert {"key k", "word 0.0.0.0", f"word {port}", "word mistral_dist_guard.RequireKey"} <= set(said)


@pytest.mark.matrix
def test_a_mistake_on_one_node_alone_is_told_there_and_ends_the_job(
    cluster: Cluster, submit: Callable[..., tuple[str, Path]], tmp_path: Path
) -> None:
    site = tmp_path / "python" / "sitecustomize.py"
    site.parent.mkdir()
    only_here = "import os, sys\nif os.environ.get('SLURM_NODEID') == '1' and 'train' in sys.argv: sys.argv.append('data.dir=nowhere')\n"
    site.write_text(only_here)
    job, run = submit(PYTHONPATH=str(site.parent))
    found = cluster.wait_for(job, "FAILED")
    assert (found["ExitCode"], found["Restarts"]) == ("137:0", "0"), log_of(run, job)
    (line,) = [line for line in log_of(run, job).splitlines() if line.startswith("error: ")]
    assert "no prepared data there; run `mistral-dist prepare`" in line
    assert_nobody_left(run)


MISTAKES = {
    "no GPU": ((), "no GPU is visible; ask for some (sbatch --gres=gpu:4 ...), or say with --processes N"),
    "no data": (("data.dir=nowhere", "--processes", "1"), "no prepared data there; run `mistral-dist prepare`"),
    "begun anew": (("--fresh", "--processes", "1"), "--fresh: not in a SLURM job, which would begin anew each time it is started again"),
    "two tasks a node": (("--processes", "1"), "SLURM started 4 tasks on 2 nodes; each node needs one"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_in_one_line_and_ends_the_job_with_2(mistake: str, cluster: Cluster, recipe: Path, tmp_path: Path) -> None:
    words, told = MISTAKES[mistake]
    site = tmp_path / "site.env"
    site.write_text(f'PATH="{Path(sys.executable).parent}:$PATH"\n')
    tasks = ["--ntasks-per-node=2"] if mistake == "two tasks a node" else []
    output = tmp_path / "job.log"
    job = cluster.submit("--nodes=2", *tasks, f"--output={output}", SCRIPT, recipe, f"run.dir={tmp_path}/run", *words, SITE_ENV=str(site))
    found = cluster.wait_for(job, "FAILED")
    assert (found["ExitCode"], found["Restarts"]) == ("2:0", "0"), output.read_text()
    said = [line for line in output.read_text().splitlines() if line.startswith("error: ")]
    assert len(said) == (4 if tasks else 2), "one line of each task"
    assert all(told in line for line in said)
    assert "Traceback" not in output.read_text()


def submit_by_hand(cluster: Cluster, recipe: Path, site: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    """`slurm/train.sh RECIPE` on the login node."""
    return subprocess.run(
        [SCRIPT, recipe, *words],
        env={**cluster.environment, "SITE_ENV": str(site)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("module load nosuch", "site.env, line 2: failed: module load nosuch"),
        ("MAX_RESTARTS=often", "site.env: MAX_RESTARTS=often: a whole number is wanted"),
        ("CONTAINER='nosuch exec image.sif'", "nosuch: not found; say in "),
        ("SBATCH_PARTITION=paid", "sbatch did not take the job; account, partition, GPUs and time are named in "),
        ("SBATCH_PARTITION=nosuch", "sbatch did not take the job; account, partition, GPUs and time are named in "),
    ],
)
def test_what_is_wrong_with_the_site_is_told_where_the_job_is_submitted(
    line: str, told: str, cluster: Cluster, recipe: Path, tmp_path: Path
) -> None:
    site = tmp_path / "site.env"
    site.write_text(f'PATH="{Path(sys.executable).parent}:$PATH"\n{line}\n')
    done = submit_by_hand(cluster, recipe, site, f"run.dir={tmp_path}/run")
    assert done.returncode == 2, done.stdout + done.stderr
    assert told in done.stderr.splitlines()[-1]
    assert str(site) in done.stderr.splitlines()[-1]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--fresh"], "--fresh: not in a job"),
        (["--offload", "--zero", "1"], "--offload with --zero 1"),
        (["data.dir=nowhere"], "no prepared data there"),
        (["model.path=nowhere"], "model.path: nowhere: no model there"),
        (["optim.learning_rates=1"], "did you mean optim.learning_rate?"),
    ],
)
def test_what_is_wrong_with_the_recipe_is_told_before_a_job_waits_for_hours(
    words: list[str], told: str, cluster: Cluster, recipe: Path, tmp_path: Path
) -> None:
    site = tmp_path / "site.env"
    site.write_text(f'PATH="{Path(sys.executable).parent}:$PATH"\n')
    before = cluster.call("squeue", "--noheader", "--states=all")
    done = submit_by_hand(cluster, recipe, site, f"run.dir={tmp_path}/run", *words)
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = done.stderr.splitlines()
    assert told in line
    assert cluster.call("squeue", "--noheader", "--states=all") == before
