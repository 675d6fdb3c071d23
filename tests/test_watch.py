"""Ranks that die, hang or fail: the others stop in time, and say which rank it was and in which collective."""

import json
import multiprocessing
import os
import re
import signal
import socket
import sys
import time

import pytest
import torch
from distributed import PRELOAD

from groupwise.engine.mesh import Mesh
from groupwise.engine.watch import Watch, leave_process

TIMEOUT_S = 2.0
ALLOWANCE_S = 20.0  # for a busy machine; a rank that waits for c10d's own timeout takes longer
FAULTY = 1


def end_of(fn, world_size, folder, *args, timeout_s=TIMEOUT_S, init_method=None, but=None):
    """Run ``fn(mesh, *args)`` on gloo ranks; (status, standard error) of each once all ``but`` one have ended.

    The status of a rank that did not end in time is None.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    init_method = init_method or f"file://{folder}/rendezvous"
    ranks = [
        context.Process(target=_rank, args=(fn, rank, world_size, folder, timeout_s, init_method, args), daemon=True)
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    deadline = time.monotonic() + timeout_s + ALLOWANCE_S
    try:
        for rank, process in enumerate(ranks):
            if rank != but:
                process.join(deadline - time.monotonic())
        return [(process.exitcode, (folder / f"stderr-{rank}").read_text()) for rank, process in enumerate(ranks)]
    finally:
        for process in ranks:
            process.kill()
            process.join()


def _rank(fn, rank, world_size, folder, timeout_s, init_method, args):
    os.dup2(os.open(folder / f"stderr-{rank}", os.O_CREAT | os.O_WRONLY), 2)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), CUDA_VISIBLE_DEVICES="")
    os.environ.update(LOCAL_WORLD_SIZE=str(world_size))
    torch.set_num_threads(1)
    with Mesh.create(timeout_s=timeout_s, init_method=init_method) as mesh:
        fn(mesh, *args)


def gather(mesh):
    size = mesh.shard_size
    mesh.all_gather_into(torch.zeros(4 * size), torch.ones(4), "model.layers.3").wait()


def fails_in_the_middle(mesh, fault, faulty=FAULTY):
    gather(mesh)
    mesh.barrier()
    if mesh.rank == faulty:
        if fault == "raise":
            raise ValueError("this rank breaks")
        if fault == "sleep":
            time.sleep(100)
        os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[fault])
    gather(mesh)


# A collective that fails raises; a main thread that is stuck in one is ended. A rank that raises may go slowly.
SENTENCES = {
    "kill": r"RankLost: rank 1 died \(process \d+ is gone\); ",
    "raise": r"(RankLost|error): rank 1 ended with ValueError: this rank breaks; ",
    "stop": r"\Aerror: rank 1 gave no sign of life for \d s \(process \d+ is stopped\); ",
    "sleep": r"\Aerror: rank 1 did not enter all-gather of model.layers.3 in \d s "
    r"and had last entered barrier, \d s ago; ",
}


@pytest.mark.parametrize("fault", SENTENCES)
@pytest.mark.parametrize("world_size", [2, 3])
def test_the_others_stop_and_name_the_rank_and_the_collective(fault, world_size, tmp_path):
    ends = end_of(fails_in_the_middle, world_size, tmp_path, fault, but=FAULTY if fault == "stop" else None)
    for rank, (status, said) in enumerate(ends):
        if rank != FAULTY:
            assert status == 1, (rank, status, said)
            assert re.search(SENTENCES[fault] + f"rank {rank} was in all-gather of model.layers.3\n", said), said
    status, said = ends[FAULTY]
    assert status == {"kill": -signal.SIGKILL, "stop": None}.get(fault, 1)
    if fault == "sleep":  # it ends by itself, too
        assert "error: rank 1 did not enter all-gather of model.layers.3" in said


def comes_late_to_one_that_blocks(mesh):
    mesh.barrier()
    if mesh.rank == FAULTY:
        time.sleep(100)
    mesh.all_reduce(torch.zeros(1))


def test_a_hang_in_a_collective_that_blocks_is_named_too(tmp_path):
    status, said = end_of(comes_late_to_one_that_blocks, 2, tmp_path)[0]
    assert status == 1
    assert re.match(r"error: rank 1 did not enter all-reduce \(sum\) over the world in \d s", said), said


def test_the_rank_that_serves_the_store_may_die(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ends = end_of(fails_in_the_middle, 3, tmp_path, "kill", 0, init_method=f"tcp://127.0.0.1:{port}")
    for rank, (status, said) in enumerate(ends[1:], 1):
        assert status == 1
        assert re.search(rf"rank 0 died \(process \d+ is gone\); rank {rank} was in all-gather of model", said), said


def dies_while_another_computes(mesh):
    mesh.barrier()
    if mesh.rank == FAULTY:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(100)


def test_a_rank_in_no_collective_stops_too(tmp_path):
    status, said = end_of(dies_while_another_computes, 2, tmp_path)[0]
    assert status == 1
    assert re.fullmatch(r"error: rank 1 died \(process \d+ is gone\); rank 0 had last been in barrier\n", said)


def a_row_hangs(mesh):
    grid = Mesh(rank=mesh.rank, world_size=4, group=mesh.group, shard_size=2)
    grid.watch.stop()
    grid.watch = mesh.watch
    gather(grid)
    if mesh.rank == 3:
        time.sleep(100)
    gather(grid)
    grid.sum_replicas(torch.ones(2), "model.layers.2").wait()


def test_of_the_ranks_that_wait_for_each_other_the_last_is_named(tmp_path):
    """Ranks 0 and 1 wait for ranks 2 and 3 in the sum, and rank 2 for rank 3 in the gather before it."""
    ends = end_of(a_row_hangs, 4, tmp_path)
    assert [status for status, _ in ends] == [1] * 4
    assert all("rank 3 did not enter all-" in said for _, said in ends), ends


def is_slow(mesh):
    mesh.barrier()
    prefetched = mesh.all_gather_into(torch.zeros(8), torch.ones(4), "model.layers.3")
    time.sleep(3.5)
    prefetched.wait()


def test_a_rank_computes_for_longer_than_the_timeout_where_nobody_waits_for_it(tmp_path):
    assert [status for status, _ in end_of(is_slow, 2, tmp_path, timeout_s=1.0)] == [0, 0]


def wrong_size(mesh):
    mesh.all_gather_into(torch.zeros(4), torch.ones(3), "model.layers.3").wait()


def test_a_mistake_in_a_collective_stays_what_it_is(tmp_path):
    for _, said in end_of(wrong_size, 2, tmp_path):
        assert "RankLost: all-gather" not in said
        assert "RuntimeError: The size of tensor a" in said


def test_nothing_is_kept_of_a_collective_that_has_ended():
    watch = Watch(0, 2)
    for _ in range(10):
        with watch.inside("barrier"):
            pass
    assert watch._under_way == {}
    call = watch.enter("all-gather")
    assert (call.number, call.what, list(watch._under_way)) == (11, "all-gather", [11])


def test_last_words_are_in_torchruns_report(tmp_path):
    report = tmp_path / "error.json"
    pid = os.fork()
    if pid == 0:
        os.environ["TORCHELASTIC_ERROR_FILE"] = str(report)
        sys.stderr = (tmp_path / "stderr").open("w")
        leave_process(7, "error: rank 1 died", at_once=True)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    assert (tmp_path / "stderr").read_text() == "error: rank 1 died\n"
    assert json.loads(report.read_text())["message"]["message"] == "error: rank 1 died"
