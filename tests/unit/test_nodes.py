"""Several machines: what the user names, what SLURM tells, what cannot be, and the line that comes of it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from mistral_dist import doctor
from mistral_dist.config import Recipe
from mistral_dist.errors import MachineError, RecipeError, RunError
from mistral_dist.runtime import launcher, nodes, process, slurm
from mistral_dist.runtime.nodes import Nodes, interface, nodes_of
from mistral_dist.topology import Topology, training_line
from mistral_dist.workflow import refuse_fresh
from tests.launch import ROOT

RECIPE = ROOT / "configs/recipes/mistral7b_chat.yaml"
STEP = {
    "SLURM_JOB_ID": "123457",
    "SLURM_STEP_NODELIST": "gpu[007-008]",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_NODEID": "1",
    "SLURM_LAUNCH_NODE_IPADDR": "10.1.2.3",
}


@pytest.fixture(autouse=True)
def outside_of_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)


def in_step(monkeypatch: pytest.MonkeyPatch, **more: str) -> None:
    for name, value in {**STEP, **more}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("main", "address", "port"),
    [
        ("gpu1", "gpu1", 29500),
        ("gpu1:1234", "gpu1", 1234),
        ("10.0.0.1:1234", "10.0.0.1", 1234),
        ("fe80::1", "fe80::1", 29500),
        ("[fe80::1]:1234", "fe80::1", 1234),
        ("[fe80::1]", "fe80::1", 29500),
    ],
)
def test_nodes_are_what_the_user_names(main: str, address: str, port: int) -> None:
    assert nodes_of(3, 2, main) == Nodes(3, 2, address, port)


@pytest.mark.parametrize("given", [(None, None, None), (1, None, None), (1, 0, "gpu1")])
def test_one_machine_is_no_nodes(given: tuple[int | None, int | None, str | None]) -> None:
    assert nodes_of(*given) is None


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ((2, None, "gpu1"), "--nodes 2: which of them is this machine? Add --node-rank 0 on the first, up to 1 on the last"),
        ((2, 0, None), "--nodes 2: where do they meet? Add --main-address HOST"),
        ((2, 2, "gpu1"), "--node-rank 2: of 2 nodes the last is 1"),
        ((1, 5, "gpu1"), "--node-rank 5: of 1 nodes the last is 0"),
        ((None, 1, None), "--node-rank and --main-address go with --nodes"),
        ((None, None, "gpu1"), "--node-rank and --main-address go with --nodes"),
        ((2, 0, "gpu1:"), "nothing is no port"),
        ((2, 0, "gpu1:ssh"), "ssh is no port"),
        ((2, 0, "gpu1:70000"), "70000 is no port"),
    ],
)
def test_what_is_missing_is_asked_for(given: tuple[int | None, int | None, str | None], told: str) -> None:
    with pytest.raises(RecipeError) as caught:
        nodes_of(*given)
    assert told in str(caught.value)


def test_in_a_step_of_slurm_all_of_it_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    in_step(monkeypatch)
    monkeypatch.setattr(slurm.socket, "getaddrinfo", lambda *_: [])
    assert nodes_of(None, None, None) == Nodes(2, 1, "gpu007", 10_000 + 123457 % 20_000)
    assert nodes_of(None, None, "other:77") == Nodes(2, 1, "other", 77), "what the user names goes before"
    assert nodes_of(2, 1, "other:77") == Nodes(2, 1, "other", 77), "what is so may be said"
    assert nodes_of(1, None, None) is None


@pytest.mark.parametrize("given", [(4, None, None), (2, 0, "gpu007"), (None, 0, None)])
def test_in_a_step_of_slurm_nothing_else_may_be_said_of_its_nodes(given: tuple[Any, Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    in_step(monkeypatch)
    with pytest.raises(RecipeError, match=r"this is node 1 of the 2 of a SLURM step.*sbatch --nodes=2 slurm/train.sh RECIPE"):
        nodes_of(*given)


def test_a_node_that_no_name_leads_to_is_reached_where_srun_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object) -> None:
        raise OSError(-2, "Name or service not known")

    in_step(monkeypatch)
    monkeypatch.setattr(slurm.socket, "getaddrinfo", unknown)
    found = nodes_of(None, None, None)
    assert found is not None
    assert found.address == "10.1.2.3"


def test_a_node_with_several_tasks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    in_step(monkeypatch, SLURM_STEP_NUM_TASKS="8")
    with pytest.raises(RecipeError, match=r"SLURM started 8 tasks on 2 nodes; .* srun --ntasks-per-node=1"):
        nodes_of(None, None, None)
    in_step(monkeypatch, SLURM_STEP_NUM_NODES="1", SLURM_STEP_NUM_TASKS="4")
    with pytest.raises(RecipeError, match="SLURM started 4 tasks on 1 node; each"):
        nodes_of(None, None, None)


def test_a_batch_script_is_no_task_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its variables say node 0 on every node; of several nodes it would train on one alone."""
    for name in ("SLURM_JOB_ID", "SLURM_NODEID"):
        monkeypatch.setenv(name, STEP[name])
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "1")
    assert nodes_of(None, None, None) is None
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    with pytest.raises(RecipeError, match=r"has 2 nodes, and this process would train on one alone: .*srun --ntasks-per-node=1"):
        nodes_of(None, None, None)
    assert nodes_of(1, None, None) is None


@pytest.mark.parametrize(
    ("names", "first"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("n[1-2,7]", "n1"),
        ("gpu[007-011,020],login1", "gpu007"),
        ("a-b[3]-ib", "a-b3-ib"),
        ("x[9],y[1-2]", "x9"),
    ],
)
def test_the_first_of_slurms_names(names: str, first: str) -> None:
    assert slurm.first_name(names) == first


def test_jobs_that_may_share_a_node_meet_at_other_ports(monkeypatch: pytest.MonkeyPatch) -> None:
    in_step(monkeypatch)
    task = slurm.task()
    assert task is not None
    found = {slurm.port(slurm.Task(**{**vars(task), "job": str(job)})) for job in range(5000, 5100)}
    assert len(found) == 100
    assert min(found) >= 10_000 and max(found) < 32_768, "below what Linux gives to outgoing connections"


def test_nodes_on_this_machine_alone_need_no_interface() -> None:
    assert interface(Nodes(2, 0, "127.0.0.1", 29500)) is None


def test_where_the_way_to_node_0_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Debian's installer has a host's own name stand for 127.0.1.1: the interface of the default route is taken."""
    real = nodes._source
    monkeypatch.setattr(nodes, "_source", lambda host: real("127.0.0.1") if host == "gpu0" else nodes.ipaddress.ip_address("10.9.8.7"))
    here = type("Address", (), {"address": "10.9.8.7"})
    monkeypatch.setattr(nodes.psutil, "net_if_addrs", lambda: {"lo": [], "ib0": [here]})
    assert interface(Nodes(2, 0, "gpu0", 29500)) == "ib0"


# the line


def test_the_line_of_a_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    asked = Topology(processes=4, nodes=Nodes(2, 1, "gpu1", 29501))
    line = training_line(Recipe.load(RECIPE), ["my.yaml"], asked)
    assert (line.processes, line.config.stem, line.deepspeed and line.deepspeed.stem) == (8, "multi_node", "zero2")
    assert "--num_processes 8" in str(line)
    assert "--num_machines 2 --machine_rank 1 --main_process_ip gpu1 --main_process_port 29501" in str(line)
    flat = training_line(Recipe.load(RECIPE), ["my.yaml"], Topology(processes=1, zero=0, nodes=asked.nodes))
    assert (flat.processes, flat.config.stem, flat.deepspeed) == (2, "data_parallel", None)


def test_no_gpu_in_a_job_is_refused_unless_cpu_processes_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mistral_dist.topology.launcher.visible_gpus", lambda: 0)
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    with pytest.raises(
        RecipeError, match=r"SLURM job 17: no GPU is visible; ask for some \(sbatch --gres=gpu:4 ...\), or say with --processes N"
    ):
        training_line(Recipe.load(RECIPE), ["my.yaml"], Topology())
    assert training_line(Recipe.load(RECIPE), ["my.yaml"], Topology(processes=1)).processes == 1
    monkeypatch.delenv("SLURM_JOB_ID")
    assert training_line(Recipe.load(RECIPE), ["my.yaml"], Topology()).processes == 2


def test_a_config_that_would_leave_deepspeed_out_is_refused() -> None:
    config = ROOT / "configs/accelerate/data_parallel.yaml"
    with pytest.raises(RecipeError, match=r"--zero 2: .*data_parallel.yaml does not start DeepSpeed"):
        training_line(Recipe.load(RECIPE), ["my.yaml"], Topology(zero=2, config=config))
    own = ROOT / "configs/accelerate/multi_gpu.yaml"
    assert training_line(Recipe.load(RECIPE), ["my.yaml"], Topology(zero=3, config=own)).config == own


@pytest.mark.parametrize(("content", "told"), [(None, "no such file"), ("a: [", "cannot be read as YAML")])
def test_a_config_that_is_none(content: str | None, told: str, tmp_path: Path) -> None:
    config = tmp_path / "own.yaml"
    if content is not None:
        config.write_text(content)
    with pytest.raises(RecipeError, match=rf"--config-file {config}: {told}"):
        training_line(Recipe.load(RECIPE), ["my.yaml"], Topology(zero=2, config=config))


def test_a_config_of_ones_own_goes_without_nodes() -> None:
    asked = Topology(config=ROOT / "configs/accelerate/multi_node.yaml", nodes=Nodes(2, 0, "gpu1", 1))
    with pytest.raises(RecipeError, match="--config-file: not on several nodes"):
        training_line(Recipe.load(RECIPE), ["my.yaml"], asked)


def test_a_job_that_may_be_requeued_never_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_fresh(Topology())
    with pytest.raises(RunError, match="--fresh: not on several nodes"):
        refuse_fresh(Topology(nodes=Nodes(2, 0, "gpu1", 1)))
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    with pytest.raises(RunError, match="--fresh: not in a SLURM job, which would begin anew each time it is started again"):
        refuse_fresh(Topology())


# signals that a scheduler sends to every process


def test_an_agent_leaves_signals_to_its_launcher_and_its_workers() -> None:
    def begin() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests may themselves be run by nohup
        process.become_agent()

    agent = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], preexec_fn=begin)
    try:
        for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM):
            agent.send_signal(number)
        time.sleep(1.0)
        assert agent.poll() is None
        agent.send_signal(signal.SIGHUP)
        assert agent.wait(10) == -signal.SIGHUP, "a terminal that closes is not ignored, or workers would take it for nohup"
    finally:
        agent.kill()
        agent.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_where_there_is_nothing_to_save_a_stop_ends_at_once_with_its_code(number: signal.Signals) -> None:
    code = (
        "import time\nfrom mistral_dist.runtime.process import leave_when_asked\nleave_when_asked(85)\nprint(1, flush=True)\ntime.sleep(60)"
    )
    started = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=ROOT)
    try:
        assert started.stdout is not None
        started.stdout.readline()
        started.send_signal(number)
        assert started.wait(10) == 85
    finally:
        started.kill()
        started.communicate()


def test_a_config_of_the_users_own_is_not_asked_for_what_it_does_not_do() -> None:
    own = ROOT / "configs/accelerate/multi_gpu.yaml"
    with pytest.raises(RecipeError, match=r"--zero 0: .*multi_gpu\.yaml starts DeepSpeed; take a config without it"):
        training_line(Recipe.load(RECIPE), ["my.yaml"], Topology(zero=0, config=own))
    if not launcher.visible_gpus():
        with pytest.raises(RecipeError, match="--gpus 8: no GPU is visible here"):
            training_line(Recipe.load(RECIPE), ["my.yaml"], Topology(gpus=8, config=own))


def test_a_driver_that_is_too_old_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "has_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert launcher.visible_gpus() == 4
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MachineError, match=r"4 GPUs are here, and torch .* cannot use them: the NVIDIA driver is older"):
        launcher.visible_gpus()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    (finding,) = doctor._gpus()
    assert finding.remedy == launcher.OLD_DRIVER
