"""Who a rank is, from the variables of real Slurm 22.05 steps; and how ranks meet, or say who did not come."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import InterruptedRunError, JobError, MusterError, OutsideError
from jobs.process_group import RankInfo, open_process_group, parse_tasks_per_node, read_rank_info, rendezvous_port

# As slurmd 22.05.8 set them for `sbatch -N2 --ntasks-per-node=2`, `srun`, task 2.
STEP = {
    "SLURMD_NODENAME": "gpu-2",
    "SLURM_CLUSTER_NAME": "demo",
    "SLURM_JOB_ID": "41",
    "SLURM_JOB_NODELIST": "gpu-[1-2]",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
    "SLURM_NODELIST": "gpu-[1-2]",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "2",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "gpu-[1-2]",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_TASKS_PER_NODE": "2(x2)",
}


def test_a_rank_of_a_step_knows_its_place() -> None:
    """Task 2 of 4 on 2 nodes is local rank 0 of 2 on the second node, and looks for rank 0 on the first."""
    info = read_rank_info(STEP)
    assert (info.rank, info.local_rank, info.world_size, info.local_world_size) == (2, 0, 4, 2)
    assert (info.node, info.nodes, info.master_address) == ("gpu-2", ("gpu-1", "gpu-2"), "gpu-1")
    assert info.export()["MASTER_PORT"] == str(info.master_port)
    assert info.export()["LOCAL_WORLD_SIZE"] == "2"


def test_a_step_smaller_than_its_job_is_counted_by_the_step() -> None:
    """`srun -n1 -N1` in a job of 2 nodes is one rank on one node, though SLURM_NODELIST still names both."""
    info = read_rank_info(
        {
            **STEP,
            "SLURM_PROCID": "0",
            "SLURM_NODEID": "0",
            "SLURM_STEP_NUM_TASKS": "1",
            "SLURM_STEP_NODELIST": "gpu-1",
            "SLURM_STEP_TASKS_PER_NODE": "1",
        }
    )
    assert (info.world_size, info.nodes) == (1, ("gpu-1",))


def test_nodes_may_hold_different_numbers_of_ranks() -> None:
    """With 2,1 tasks the second node's only rank has a local world of 1, and the first node's ranks one of 2."""
    uneven = {**STEP, "SLURM_STEP_TASKS_PER_NODE": "2,1", "SLURM_STEP_NUM_TASKS": "3"}
    assert read_rank_info(uneven).local_world_size == 1
    assert (
        read_rank_info({**uneven, "SLURM_NODEID": "0", "SLURM_PROCID": "1", "SLURM_LOCALID": "1"}).local_world_size == 2
    )


@pytest.mark.parametrize(
    ("text", "counts"), [("8", [8]), ("8(x4)", [8] * 4), ("2,1", [2, 1]), ("8(x2),4", [8, 8, 4]), ("1(x2),2,1", [1, 1, 2, 1])]
)  # fmt: skip
def test_tasks_per_node_is_read_in_every_form(text: str, counts: list[int]) -> None:
    """Plain, repeated and mixed counts give one number a node."""
    assert parse_tasks_per_node(text) == counts


@pytest.mark.parametrize("text", ["", "8(x)", "8x4", "a", "8,,4"])
def test_nonsense_tasks_per_node_is_refused_with_its_value(text: str) -> None:
    """The message shows what stood there."""
    with pytest.raises(JobError, match="SLURM_TASKS_PER_NODE"):
        parse_tasks_per_node(text)


def test_a_trainer_started_without_srun_is_told_so() -> None:
    """In a batch shell of 4 tasks Slurm says PROCID 0 but names no step: waiting for 3 ranks that never come is refused."""
    batch = {key: value for key, value in STEP.items() if not key.startswith("SLURM_STEP_")}
    with pytest.raises(JobError, match="srun python"):
        read_rank_info({**batch, "SLURM_PROCID": "0"})


def test_torchrun_under_srun_wins_over_the_step() -> None:
    """One srun task a node that runs torchrun: the workers' own variables count, not the agent's."""
    worker = {
        **STEP,
        "TORCHELASTIC_RUN_ID": "x",
        "RANK": "5",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "8",
        "LOCAL_WORLD_SIZE": "4",
    }
    info = read_rank_info({**worker, "MASTER_ADDR": "gpu-1", "MASTER_PORT": "29400"})
    assert (info.rank, info.world_size, info.master_port, info.job_id) == (5, 8, 29400, "41")


def test_outside_slurm_there_is_one_process_or_what_the_launcher_says() -> None:
    """Nothing set: rank 0 of 1. RANK and WORLD_SIZE set: those."""
    assert read_rank_info({}).world_size == 1
    assert read_rank_info({}).job_id is None
    assert read_rank_info({"RANK": "1", "WORLD_SIZE": "2"}).rank == 1


@pytest.mark.parametrize(
    "change",
    [{"SLURM_PROCID": "4"}, {"SLURM_PROCID": "x"}, {"SLURM_STEP_TASKS_PER_NODE": "2"}, {"SLURM_NODEID": "2"}],
)  # fmt: skip
def test_contradicting_variables_are_refused(change: dict[str, str]) -> None:
    """A rank beyond the world, or counts that do not add up, would hang or train on wrong data: refused at once."""
    with pytest.raises(JobError):
        read_rank_info({**STEP, **change})


def test_elements_of_an_array_are_named_as_people_write_them() -> None:
    """Their own numbers make different ports; they are shown as 2_4."""
    info = read_rank_info({**STEP, "SLURM_ARRAY_JOB_ID": "2", "SLURM_ARRAY_TASK_ID": "4"})
    assert info.display_id == info.slurm_id == "2_4"


@given(job=st.integers(1, 10**8), restart=st.integers(0, 1000), step=st.integers(0, 1000))
def test_ports_stay_clear_of_others(job: int, restart: int, step: int) -> None:
    """No port lies among Slurm's own, at torch's default, or among those that Linux hands out."""
    port = rendezvous_port(str(job), restart, str(step))
    assert 7_000 < port < 29_500


@given(
    job=st.integers(1, 10**8), other=st.integers(-270, 270), attempts=st.tuples(st.integers(0, 7), st.integers(0, 7))
)
def test_neighbouring_jobs_and_attempts_never_share_a_port(job: int, other: int, attempts: tuple[int, int]) -> None:
    """A stale rank of an earlier attempt, or a job started just before, is never at the port where this one meets."""
    first, second = (job, attempts[0]), (max(1, job + other), attempts[1])
    ports = [rendezvous_port(str(number), restart) for number, restart in (first, second)]
    assert (ports[0] == ports[1]) == (first == second)


def test_clusters_on_one_machine_have_ports_of_their_own() -> None:
    """Job 4 of the cluster `demo` and job 4 of `session` run side by side on a laptop."""
    assert rendezvous_port("4", 0, cluster="demo") != rendezvous_port("4", 0, cluster="session")


# How ranks meet


def rank_info(rank: int, world_size: int, port: int, *, restart_count: int = 0) -> RankInfo:
    return RankInfo(
        rank=rank,
        local_rank=rank,
        world_size=world_size,
        local_world_size=world_size,
        node=f"node-{rank}",
        nodes=tuple(f"node-{number}" for number in range(world_size)),
        master_address="127.0.0.1",
        master_port=port,
        job_id="7",
        restart_count=restart_count,
    )


def join(info: RankInfo, timeout_s: float, answers: Any) -> None:
    """Run in a process of its own: join, sum the ranks, report."""
    import torch
    import torch.distributed as dist

    try:
        open_process_group(info, timeout_s)
        total = torch.tensor([info.rank])
        dist.all_reduce(total)
        answers.put((info.rank, int(total)))
        dist.barrier()
        dist.destroy_process_group()
    except MusterError as error:
        answers.put((info.rank, f"{type(error).__name__}: {error}"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_ranks(infos: list[RankInfo], timeout_s: float) -> dict[int, Any]:
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    processes = [context.Process(target=join, args=(info, timeout_s, answers), daemon=True) for info in infos]
    for process in processes:
        process.start()
    try:
        return dict(answers.get(timeout=90) for _ in processes)
    finally:
        for process in processes:
            process.join(timeout=10)
            process.kill()


def test_ranks_meet_and_reduce() -> None:
    """Three processes join one gloo group, and a sum over it is right."""
    port = free_port()
    assert run_ranks([rank_info(rank, 3, port) for rank in range(3)], 60) == {0: 3, 1: 3, 2: 3}


def test_a_missing_rank_is_named_to_everyone_who_came() -> None:
    """Rank 1 of 3 does not come: ranks 0 and 2 both fail with its number, the port and the nodes."""
    port = free_port()
    answers = run_ranks([rank_info(0, 3, port), rank_info(2, 3, port)], 12)
    for answer in answers.values():
        assert answer.startswith("OutsideError: 1 of 3 ranks did not come")
        assert "rank 1." in answer
        assert str(port) in answer
        assert "node-1" in answer


def test_a_rank_of_an_earlier_attempt_is_not_counted() -> None:
    """A stale rank that finds the port does not stand in for the missing one of this attempt."""
    port = free_port()
    answers = run_ranks([rank_info(0, 2, port, restart_count=1), rank_info(1, 2, port, restart_count=0)], 8)
    assert "1 of 2 ranks did not come" in answers[0]
    assert "OutsideError" in answers[1]


def test_an_occupied_port_is_reported_by_rank_0() -> None:
    """Another program listens there: the message says so and how to find it, instead of a time-out."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(OutsideError, match=r"in use by another program.*ss -ltnp"):
            open_process_group(rank_info(0, 2, other.getsockname()[1]), 5)


def test_a_stop_while_ranks_gather_is_not_sat_out() -> None:
    """A preemption during start-up ends the wait at once: nobody comes, and the deadline is an hour away."""
    import signal

    from jobs.interruption import StopSignals

    started = time.monotonic()
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(InterruptedRunError, match="SIGTERM"):
            open_process_group(rank_info(0, 2, free_port()), 3600, stop=stop)
    assert time.monotonic() - started < 30


def test_an_unknown_first_node_is_named() -> None:
    """A name that does not resolve is said to be that, not a connection problem."""
    import dataclasses

    lost = dataclasses.replace(rank_info(1, 2, free_port()), master_address="no-such-node.invalid")
    with pytest.raises(OutsideError, match=r"no-such-node\.invalid, does not resolve"):
        open_process_group(lost, 5)


def test_one_process_needs_no_group() -> None:
    """A single rank returns at once, and nothing listens anywhere."""
    import torch.distributed as dist

    open_process_group(read_rank_info({}))
    assert not dist.is_initialized()
