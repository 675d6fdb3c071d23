"""Two hosts with their own names and addresses on one machine: what their ranks say when one is cut off, and go on."""

import ctypes
import json
import multiprocessing
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from distributed import PRELOAD, run_ranks
from hosts import lay_cable, two_hosts
from small_tables import small_tables
from test_recipes import SMALL, run

from groupwise.engine.errors import UserError
from groupwise.engine.mesh import Mesh
from groupwise.engine.together import check_shared

ALLOWANCE_S = 30.0  # for a busy machine
PORT = 29400
DOCS = Path(__file__).resolve().parent.parent / "docs"
HERE = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1", "RANKS": "1"}


@pytest.fixture
def hosts(tmp_path):
    with two_hosts(tmp_path) as both:
        yield both


# Ranks alone ----------------------------------------------------------------------------------------------------------


def _rank(fn, rank, host_pid, folder, timeout_s):
    libc = ctypes.CDLL(None, use_errno=True)
    for kind in ("net", "uts"):
        with open(f"/proc/{host_pid}/ns/{kind}") as namespace:
            assert libc.setns(namespace.fileno(), 0) == 0, os.strerror(ctypes.get_errno())
    os.dup2(os.open(folder / f"stderr-{rank}", os.O_CREAT | os.O_WRONLY), 2)
    os.environ.update(RANK=str(rank), WORLD_SIZE="4", LOCAL_RANK=str(rank % 2), LOCAL_WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="10.77.0.1", MASTER_PORT=str(PORT), CUDA_VISIBLE_DEVICES="")
    os.environ.update(GLOO_SOCKET_IFNAME="eth0")  # these processes read the machine's /etc/hosts
    torch.set_num_threads(1)
    with Mesh.create(timeout_s=timeout_s, shard_size=2) as mesh:
        fn(mesh, folder)


def sums_without_end(mesh, folder):
    """One copy of the model a host: parts are gathered within one, and summed between them."""
    while True:
        mesh.all_gather_into(torch.zeros(8), torch.ones(4), "model.layers.3").wait()
        total = torch.full((2,), float(mesh.rank))
        mesh.sum_replicas(total, "model.layers.3").wait()
        assert total.tolist() == [2 * (mesh.rank % 2) + 2] * 2  # of ranks 0 and 2, or 1 and 3
        (folder / f"summed-{mesh.rank}").touch()
        time.sleep(0.01)


def test_both_sides_of_a_cut_name_the_other_one_in_time(hosts, tmp_path):
    timeout_s = 6.0
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    pids = [hosts[rank // 2].pid for rank in range(4)]
    ranks = [
        context.Process(target=_rank, args=(sums_without_end, rank, pid, tmp_path, timeout_s), daemon=True)
        for rank, pid in enumerate(pids)
    ]
    try:
        for process in ranks:
            process.start()
        _wait_for(lambda: all((tmp_path / f"summed-{rank}").exists() for rank in range(4)), 120)
        hosts[1].unplug()
        deadline = time.monotonic() + timeout_s + ALLOWANCE_S
        for process in ranks:
            process.join(max(0.0, deadline - time.monotonic()))
        said = [(tmp_path / f"stderr-{rank}").read_text() for rank in range(4)]
        assert [process.exitcode for process in ranks] == [1] * 4, said
    finally:
        for process in ranks:
            process.kill()
            process.join()
    # A rank that waited for a neighbour, not for the other host, may pass on what that one found.
    where = r"; rank {} on host {} was in (all-reduce over the replicas|all-gather) of model.layers.3\n"
    for rank in (0, 1):
        assert re.search(r"ranks 2, 3 on host b gave no sign of life for \d s" + where.format(rank, "a"), said[rank])
    for rank in (2, 3):
        assert re.search("the store of the launch on host a does not answer" + where.format(rank, "b"), said[rank])


def sees_another_folder(mesh, folder):
    os.chdir(folder / str(mesh.rank // 2))
    Path("run").mkdir(exist_ok=True)
    with pytest.raises(UserError, match=r"run of rank 0 is not the folder that ranks 2, 3 would write to; put it on a"):
        check_shared(Path("run"), mesh)
    check_shared(folder, mesh)
    return sorted(path.name for path in Path("run").iterdir())


def test_a_folder_that_is_another_one_elsewhere_is_refused(tmp_path):
    for place in ("0", "1"):
        (tmp_path / place).mkdir()
    assert run_ranks(sees_another_folder, 4, tmp_path) == [[]] * 4


def describe_launch(monkeypatch, **environment):
    start = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    for name, value in {**start, **environment}.items():
        monkeypatch.setenv(name, value)


def test_a_port_in_use_is_one_sentence(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        describe_launch(monkeypatch, MASTER_PORT=str(port))
        with pytest.raises(UserError, match=rf"\Athe port of 127.0.0.1:{port} is in use on this host; choose another "):
            Mesh.create()


def test_a_rendezvous_that_cannot_be_reached_is_one_sentence(monkeypatch):
    describe_launch(monkeypatch, RANK="1", MASTER_PORT="1")
    with pytest.raises(UserError, match=r"\Arank 1 did not meet the others by way of 127.0.0.1:1 \(.*\); see that "):
        Mesh.create(timeout_s=-14.5)


def test_restarts_that_could_not_meet_are_refused(monkeypatch):
    """A store that torchrun keeps holds the addresses of the attempt before, and hosts count their attempts apart."""
    describe_launch(monkeypatch, TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_MAX_RESTARTS="3")
    with pytest.raises(UserError, match="set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before torchrun on every host"):
        Mesh.create()


# Launches -------------------------------------------------------------------------------------------------------------

# A state that each step changes by what all ranks bring, saved on a disk that both hosts see.
PROGRAM = """
import json, time
from pathlib import Path
import torch
from groupwise.engine.atomic import write_atomically
from groupwise.recipes.run import launch

def recipe(run):
    file = Path("state.json")
    state = run.mesh.broadcast_object(json.loads(file.read_text()) if run.is_main and file.exists() else [0, 0])
    run.say(f"met at step {state[0]}")
    while state[0] < 100:
        total = run.mesh.all_reduce(torch.tensor(float((run.mesh.rank + 1) * state[0])))
        state = [state[0] + 1, state[1] + total.item()]
        if run.is_main:
            write_atomically(file, json.dumps(state))
        time.sleep(0.1)
    run.say(f"finished with {state[1]}")

launch(recipe)
"""
RESULT = f"finished with {sum(3.0 * step for step in range(100))}"


class Launch:
    """``docs/node.sh`` on each host, and what it prints."""

    def __init__(self, hosts, *command, cwd, restarts):
        self.said = {host.name: [] for host in hosts}
        self._command, self._cwd, self._restarts = command, cwd, restarts
        self.processes, self._readers = {}, []
        for host in hosts:
            self.start(host)

    def start(self, host):
        environment = {"HOSTS": "2", "ENDPOINT": f"a:{PORT}", "ID": "test", "ADDRESS": host.address}
        environment |= {**HERE, "RESTARTS": str(self._restarts)}
        process = host.start("bash", str(DOCS / "node.sh"), *self._command, cwd=self._cwd, **environment)
        self.processes[host.name] = process
        for stream in (process.stdout, process.stderr):
            reader = threading.Thread(target=lambda s=stream: self.said[host.name].extend(s), daemon=True)
            reader.start()
            self._readers.append(reader)

    def wait_for(self, text, host, seconds=600):
        _wait_for(lambda: any(text in line for line in self.said[host]), seconds, self.said)

    def end(self, seconds=900):
        """The statuses, by host."""
        deadline = time.monotonic() + seconds
        for process in self.processes.values():
            process.wait(max(1.0, deadline - time.monotonic()))
        for reader in self._readers:
            reader.join(10)
        return {name: process.returncode for name, process in self.processes.items()}


def _wait_for(condition, seconds, report=None):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, report
        time.sleep(0.05)


@pytest.fixture
def program(tmp_path):
    file = tmp_path / "program.py"
    file.write_text(PROGRAM)
    return ["program", f"run.folder={tmp_path}/runs", "run.timeout_s=10"]


B_IS_LOST = "error: rank 1 on host b gave no sign of life"
A_IS_LOST = "error: the store of the launch on host a does not answer"


@pytest.mark.slow
def test_a_run_whose_host_loses_power_goes_on_when_it_is_back(hosts, program, tmp_path):
    """The torchrun of host a waits for the one that is launched again on b; the two count their attempts apart."""
    a, b = hosts
    launch = Launch(hosts, *program, cwd=tmp_path, restarts=2)
    launch.wait_for("met at step 0", "a")
    time.sleep(2)
    b.power_off()
    launch.wait_for("error: ", "a", 10 + ALLOWANCE_S)
    assert any(B_IS_LOST in line or "failed on rank 0 on host a: " in line for line in launch.said["a"]), launch.said
    b.power_on()
    lay_cable(a, b)
    launch.start(b)
    assert launch.end() == {"a": 0, "b": 0}, launch.said
    assert f"{RESULT}\n" in launch.said["a"]


@pytest.mark.slow
def test_a_run_whose_host_is_cut_off_goes_on_by_itself_and_ends_as_if_it_had_not_been(hosts, tmp_path):
    tables = tmp_path / "tables"
    tables.mkdir()
    for table in small_tables():
        table.frame.to_csv(tables / table.file, index=False)
    folder = tmp_path / "runs"
    settings = [*SMALL, f"tables={tables}", f"run.folder={folder}", "sft.steps=40"]
    settings += ["run.shard_size=1", "run.timeout_s=10"]
    recipe = ["groupwise.recipes.sft", *settings]
    run("synthesize", *settings, cwd=tmp_path)
    shutil.copytree(folder / "train" / "data", folder / "undisturbed" / "data")
    (tmp_path / "docs").symlink_to(DOCS)
    ssh = tmp_path / "ssh"  # enters a host, as ssh does: its arguments are -tt, the host, and a line for its shell
    names = " ".join(f"[{host.name}]={host.pid}" for host in hosts)
    ssh.write_text(f'#!/bin/bash\ndeclare -A pids=({names})\nexec nsenter -t ${{pids[$2]}} -n -u -m -p bash -c "$3"\n')
    ssh.chmod(0o755)
    script = ["bash", "docs/ssh.sh", "a b", *recipe, "run.name=undisturbed"]
    environment = {**os.environ, **HERE, "PATH": f"{tmp_path}:{HERE['PATH']}"}
    done = subprocess.run(script, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout

    launch = Launch(hosts, *recipe, cwd=tmp_path, restarts=2)
    records = folder / "train" / "sft.jsonl"
    _wait_for(lambda: records.exists() and records.read_text().count("\n") >= 7, 600, launch.said)
    hosts[1].unplug()
    launch.wait_for(B_IS_LOST, "a", 10 + ALLOWANCE_S)
    launch.wait_for(A_IS_LOST, "b", 10 + ALLOWANCE_S)
    hosts[1].plug_in()
    assert launch.end() == {"a": 0, "b": 0}, launch.said
    assert any("resumed after step" in line for line in launch.said["a"])
    assert [json.loads(line)["step"] for line in records.read_text().splitlines()] == list(range(40))
    ends = [(folder / name / "sft" / "model" / "model.safetensors").read_bytes() for name in ("train", "undisturbed")]
    assert ends[0] == ends[1]


@pytest.mark.slow
def test_a_launch_without_restarts_ends_on_both_sides_and_goes_on_when_it_is_launched_again(hosts, program, tmp_path):
    launch = Launch(hosts, *program, cwd=tmp_path, restarts=0)
    launch.wait_for("met at step 0", "a")
    time.sleep(2)
    hosts[0].unplug()
    launch.wait_for(B_IS_LOST, "a", 10 + ALLOWANCE_S)
    launch.wait_for(A_IS_LOST, "b", 10 + ALLOWANCE_S)
    hosts[0].plug_in()  # a torchrun that waits for an answer of the other one hears that it has gone
    assert launch.end() == {"a": 1, "b": 1}
    again = Launch(hosts, *program, cwd=tmp_path, restarts=0)
    assert again.end() == {"a": 0, "b": 0}, again.said
    assert f"{RESULT}\n" in again.said["a"]
    assert "met at step 0\n" not in again.said["a"]


@pytest.mark.parametrize("name", ["node", "ssh", "slurm"])
def test_the_scripts_can_be_read_by_the_shell(name):
    subprocess.run(["bash", "-n", str(DOCS / f"{name}.sh")], check=True)
