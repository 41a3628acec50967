"""Who this process is among the ranks of a training job, and how they find each other.

One task a GPU under `srun` is the shape this is made for: Slurm says who is who, no launcher stands between it and the trainer,
so signals reach every rank. Processes started by torchrun or `accelerate launch`, and single ones, work as well.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import sys
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cluster.errors import JobError, MusterError, OutsideError
from cluster.hostlist import expand
from cluster.slurm import SlurmCliClient, SlurmClient

if TYPE_CHECKING:
    from jobs.interruption import StopSignals

logger = logging.getLogger(__name__)

_LOWEST_PORT = 12_000
_PORT_COUNT = (
    17_389  # a prime: 12000..29388 lies below 29500 (torch's default), 32768 (Linux's ephemeral ports), above Slurm's
)
_ATTEMPTS_BEFORE_REUSE = 8
_STEPS_BEFORE_REUSE = 8

_GROUPED = re.compile(r"(\d+)(?:\(x(\d+)\))?")
_POLL_S = 0.5


@dataclass(frozen=True, kw_only=True)
class RankInfo:
    """This process's place in the job."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    """Ranks on this rank's own node; nodes may hold different numbers."""
    node: str
    nodes: tuple[str, ...]
    """Nodes of this job step in Slurm's order; rank 0 runs on the first."""
    master_address: str
    master_port: int
    job_id: str | None = None
    """Slurm's raw job number, which differs between the elements of an array; None outside Slurm."""
    restart_count: int = 0
    """How often Slurm has requeued the job: 0 in the first attempt."""
    step_id: str | None = None
    array_job_id: str | None = None
    array_task: str | None = None
    cluster: str | None = None
    """Slurm's name of the cluster: job numbers mean something only within it."""

    @property
    def display_id(self) -> str:
        """The job as people write it: `12`, `12_3` for an element of an array, `local` outside Slurm."""
        if self.array_job_id is not None and self.array_task is not None:
            return f"{self.array_job_id}_{self.array_task}"
        return self.job_id or "local"

    @property
    def slurm_id(self) -> str | None:
        """The job as Slurm's commands must be told; None outside Slurm.

        The last element of an array carries the raw number of the whole array: `scontrol requeue 12` in it would requeue
        every other element too (seen on 22.05.8). Only `12_3` is safe.
        """
        return None if self.job_id is None else self.display_id

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, the only one that writes to the journal and talks to Slurm."""
        return self.rank == 0

    @property
    def attempt_label(self) -> str:
        """What sets this attempt's ranks apart from those of any other job, attempt or step."""
        return f"{self.job_id or 'local'}.{self.restart_count}.{self.step_id or 0}"

    def export(self) -> dict[str, str]:
        """Return the variables that torch and accelerate read. Put them into `os.environ` before either is used."""
        return {
            "RANK": str(self.rank),
            "LOCAL_RANK": str(self.local_rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_WORLD_SIZE": str(self.local_world_size),
            "MASTER_ADDR": self.master_address,
            "MASTER_PORT": str(self.master_port),
        }


def read_rank_info(environ: Mapping[str, str]) -> RankInfo:
    """Find out who this process is, from the first of these that `environ` holds.

    1. torchrun or `accelerate launch` (TORCHELASTIC_RUN_ID), which may itself run under `srun`: RANK, WORLD_SIZE, ...
    2. A Slurm step (SLURM_STEP_ID): SLURM_PROCID, the step's node list and task counts. The job's own variables are not used
       for these, because a step may be smaller than its job (`srun -n1` keeps SLURM_NODELIST of the whole job).
    3. RANK and WORLD_SIZE set by something else.
    4. A single process.

    Raises:
        JobError: A variable is missing or makes no sense, or a batch script of several tasks runs the trainer without `srun`.
    """
    if "TORCHELASTIC_RUN_ID" in environ:
        return _from_launcher(environ)
    if "SLURM_STEP_ID" in environ and "SLURM_PROCID" in environ:
        return _from_step(environ)
    if "RANK" in environ and "WORLD_SIZE" in environ:
        return _from_launcher(environ)
    tasks = environ.get("SLURM_NTASKS", "1")
    if "SLURM_PROCID" in environ and tasks != "1":  # Slurm gives the batch shell SLURM_PROCID=0 but no step
        raise JobError(
            f"SLURM_NTASKS is {tasks}, but this process was not started by srun, so the other ranks would never come; "
            "start the trainer with `srun python ...` in the batch script, or ask for --ntasks=1"
        )
    node = environ.get("SLURMD_NODENAME") or socket.gethostname()
    return RankInfo(
        rank=0,
        local_rank=0,
        world_size=1,
        local_world_size=1,
        node=node,
        nodes=(node,),
        master_address="127.0.0.1",
        master_port=_default_port(environ),
        **_job_fields(environ),
    )


def rendezvous_port(
    job_id: str | None, restart_count: int, step_id: str | None = None, *, cluster: str | None = None
) -> int:
    """Return the port where the ranks of one attempt meet.

    Another attempt (up to 8 back) or step (of 8) of the same job has another port, and so do jobs whose numbers are less than
    270 apart, which is what runs on a node at one time. Elements of an array have their own numbers. The cluster's name counts
    because several clusters on one machine all begin with job 1. All ports lie in 12000-29388, clear of Slurm's (6817-6829),
    of torch's default and of the range that Linux hands out to clients.
    """
    job = int(job_id) if job_id is not None and job_id.isdecimal() else os.getppid()
    step = int(step_id) if step_id is not None and step_id.isdecimal() else 0
    slot = (restart_count % _ATTEMPTS_BEFORE_REUSE) * _STEPS_BEFORE_REUSE + step % _STEPS_BEFORE_REUSE
    origin = zlib.crc32((cluster or "").encode())
    return _LOWEST_PORT + (origin + job * _ATTEMPTS_BEFORE_REUSE * _STEPS_BEFORE_REUSE + slot) % _PORT_COUNT


def parse_tasks_per_node(text: str) -> list[int]:
    """Read SLURM_TASKS_PER_NODE: `8(x4)`, `2,1`, `8(x2),4` -> the number of tasks on each node, in order.

    Raises:
        JobError: It is none of these.
    """
    counts: list[int] = []
    for part in text.split(","):
        match = _GROUPED.fullmatch(part.strip())
        if match is None:
            raise JobError(
                f"SLURM_TASKS_PER_NODE is {text!r}; expected counts such as 8(x4) or 8(x2),4; was it changed by hand?"
            )
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def open_process_group(
    info: RankInfo,
    timeout_s: float = 300.0,
    *,
    collective_timeout_s: float = 1800.0,
    stop: StopSignals | None = None,
    slurm: SlurmClient | None = None,
) -> None:
    """Bring all ranks of this attempt together and start torch.distributed; nothing for a single process.

    Gloo on CPUs, `cpu:gloo,cuda:nccl` where this process sees a GPU. Accelerate finds the group open and uses it. Keys in the
    store carry job, attempt and step, so a rank left over from an earlier attempt can neither join nor be counted.

    Args:
        info: Who this process is.
        timeout_s: How long to wait for the last rank to arrive.
        collective_timeout_s: Deadline of each later collective.
        stop: Looked at while waiting, so that a preemption during start-up is not sat out.
        slurm: Asked for the first node's address when its name does not resolve; by default the cluster that the job runs on.

    Raises:
        OutsideError: Not all ranks arrived: the message names the missing ranks, the nodes and the port.
        InterruptedRunError: `stop` was asked for while waiting.
    """
    if info.world_size == 1:
        return
    import torch
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore

    if dist.is_initialized():
        return

    deadline = time.monotonic() + timeout_s
    store = PrefixStore(info.attempt_label, _open_store(info, deadline, stop, slurm))
    _gather_everyone(info, store, deadline, stop)
    has_gpu = torch.cuda.is_available()
    if has_gpu:
        torch.cuda.set_device(info.local_rank % torch.cuda.device_count())
    from datetime import timedelta

    dist.init_process_group(
        backend="cpu:gloo,cuda:nccl" if has_gpu else "gloo",
        store=PrefixStore("group", store),
        rank=info.rank,
        world_size=info.world_size,
        timeout=timedelta(seconds=collective_timeout_s),
    )
    logger.info("rank %d of %d joined at %s:%d", info.rank, info.world_size, info.master_address, info.master_port)


def close_process_group() -> None:
    """End torch.distributed in this process if it runs. Not a collective: call it when the ranks are known to be done."""
    if "torch.distributed" not in sys.modules:
        return
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def _open_store(info: RankInfo, deadline: float, stop: StopSignals | None, slurm: SlurmClient | None) -> Any:
    """Start the store on rank 0, connect to it elsewhere, trying again until the deadline: rank 0 may still be importing."""
    from datetime import timedelta

    import torch.distributed as dist
    from torch.distributed import TCPStore  # type: ignore[attr-defined] # documented there, but imported by a condition

    address = _resolve_master(info, slurm)
    last = "no answer"
    while True:
        _give_way(stop)
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            raise OutsideError(
                f"rank {info.rank} on {info.node} could not reach rank 0 at {info.master_address} ({address}) port "
                f"{info.master_port}: {last}. Is {info.master_address} up, did rank 0 start (see its log), and may the nodes "
                "of this cluster reach each other on that port?"
            )
        try:
            return TCPStore(
                address,
                info.master_port,
                info.world_size,
                is_master=info.rank == 0,
                # An own roll call follows: torch would count any process that connects, one from an earlier attempt too.
                wait_for_workers=False,
                timeout=timedelta(seconds=max(1.0, min(left_s, 5.0))),
            )
        except (dist.DistError, RuntimeError) as error:  # torch raises both, by version and by what went wrong
            last = str(error).splitlines()[0]
            if info.rank == 0 and "EADDRINUSE" in str(error):
                raise OutsideError(
                    f"port {info.master_port} on {info.node} is in use by another program, so the ranks cannot meet there; "
                    "the next attempt takes another port. `ss -ltnp` on that node shows who holds it"
                ) from error
            time.sleep(_POLL_S)


def _gather_everyone(info: RankInfo, store: Any, deadline: float, stop: StopSignals | None) -> None:
    """Hold a roll call at rank 0, so that a missing rank is named and everyone hears of it, not only who waits for it."""
    try:
        store.set(f"here/{info.rank}", info.node)
        if info.rank == 0:
            _call_the_roll(info, store, deadline, stop)
        else:
            _await_the_verdict(info, store, deadline, stop)
    except RuntimeError as error:  # the store's connection to rank 0 broke
        raise OutsideError(
            f"rank {info.rank} on {info.node}: lost rank 0 at {info.master_address}:{info.master_port} while the ranks "
            f"gathered ({str(error).splitlines()[0]}); its log says why"
        ) from error


def _call_the_roll(info: RankInfo, store: Any, deadline: float, stop: StopSignals | None) -> None:
    missing = list(range(1, info.world_size))
    while missing:
        missing = [rank for rank in missing if not store.check([f"here/{rank}"])]
        if missing and time.monotonic() > deadline:
            store.set("verdict", f"missing {','.join(map(str, missing))}")
            came = [rank for rank in range(1, info.world_size) if rank not in missing]
            _linger(store, [f"heard/{rank}" for rank in came])
            raise OutsideError(_missing_message(info, missing))
        if missing:
            _give_way(stop)
            time.sleep(0.05)
    store.set("verdict", "complete")


def _await_the_verdict(info: RankInfo, store: Any, deadline: float, stop: StopSignals | None) -> None:
    while not store.check(["verdict"]):
        _give_way(stop)
        if time.monotonic() > deadline + 10:  # rank 0 speaks first; past this it is gone
            raise OutsideError(
                f"rank {info.rank} on {info.node}: rank 0 at {info.master_address}:{info.master_port} said nothing while "
                "the ranks gathered; is it from another attempt, or stuck? Its log says more"
            )
        time.sleep(0.05)
    verdict = store.get("verdict").decode()
    if verdict.startswith("missing "):
        store.set(f"heard/{info.rank}", "")
        raise OutsideError(_missing_message(info, [int(rank) for rank in verdict.removeprefix("missing ").split(",")]))


def _linger(store: Any, keys: Sequence[str]) -> None:
    """Keep the store, which lives in this process, until everyone has read the bad news, for a few seconds at most."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and not all(store.check([key]) for key in keys):
        time.sleep(0.05)


def _missing_message(info: RankInfo, missing: Sequence[int]) -> str:
    shown = ", ".join(map(str, missing[:16])) + (f" and {len(missing) - 16} more" if len(missing) > 16 else "")
    return (
        f"{len(missing)} of {info.world_size} ranks did not come to {info.master_address}:{info.master_port}: rank {shown}. "
        f"The nodes are {', '.join(info.nodes[:16])}{', ...' if len(info.nodes) > 16 else ''}; look at the missing ranks' "
        "logs, and whether their nodes are up and reach that port"
    )


def _resolve_master(info: RankInfo, slurm: SlurmClient | None) -> str:
    """Return an address for the first node: its name where that resolves, else what Slurm itself uses to reach it."""
    try:
        socket.getaddrinfo(info.master_address, None)
    except OSError as error:
        if slurm is None and info.job_id is not None:
            slurm = SlurmCliClient(timeout_s=10.0)
        try:
            address = slurm.node(info.master_address).address if slurm is not None else None
        except MusterError as slurm_error:
            logger.warning("cannot ask Slurm for the address of %s: %s", info.master_address, slurm_error)
            address = None
        if address:
            return address
        raise OutsideError(
            f"the name of the first node, {info.master_address}, does not resolve on {info.node} ({error}); every node must "
            "resolve the others' names (DNS or /etc/hosts)"
        ) from error
    return info.master_address


def _give_way(stop: StopSignals | None) -> None:
    if stop is not None:
        stop.raise_if_requested("while the ranks gathered")


def _from_step(environ: Mapping[str, str]) -> RankInfo:
    rank = _number(environ, "SLURM_PROCID")
    world_size = _number(environ, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")
    if not 0 <= rank < world_size:
        raise JobError(
            f"SLURM_PROCID is {rank} of {world_size} tasks; it must be smaller. Were these variables changed by hand?"
        )
    nodes = tuple(expand(_text(environ, "SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST")))
    counts = parse_tasks_per_node(_text(environ, "SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE"))
    index = _number(environ, "SLURM_NODEID")
    if index >= len(counts) or sum(counts) != world_size or len(counts) != len(nodes):
        raise JobError(
            f"Slurm's variables contradict each other: {len(nodes)} nodes, tasks per node {counts}, {world_size} tasks, this "
            f"is node number {index}; start the trainer by srun with a clean environment"
        )
    job_id = environ.get("SLURM_JOB_ID")
    step_id = environ.get("SLURM_STEP_ID")
    return RankInfo(
        rank=rank,
        local_rank=_number(environ, "SLURM_LOCALID"),
        world_size=world_size,
        local_world_size=counts[index],
        node=environ.get("SLURMD_NODENAME") or nodes[index],
        nodes=nodes,
        master_address=nodes[0],
        master_port=rendezvous_port(
            job_id, _restart_count(environ), step_id, cluster=environ.get("SLURM_CLUSTER_NAME")
        ),
        step_id=step_id,
        **_job_fields(environ),
    )


def _from_launcher(environ: Mapping[str, str]) -> RankInfo:
    rank = _number(environ, "RANK")
    world_size = _number(environ, "WORLD_SIZE")
    if not 0 <= rank < world_size:
        raise JobError(
            f"RANK is {rank} and WORLD_SIZE {world_size}; RANK must be smaller. Unset both for a single process"
        )
    local_rank = int(environ.get("LOCAL_RANK", "0"))
    node = environ.get("SLURMD_NODENAME") or socket.gethostname()
    listed = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST")
    master = environ.get("MASTER_ADDR", "127.0.0.1")
    return RankInfo(
        rank=rank,
        local_rank=local_rank,
        world_size=world_size,
        local_world_size=int(environ.get("LOCAL_WORLD_SIZE", "1" if local_rank == 0 else str(world_size))),
        node=node,
        nodes=tuple(expand(listed)) if listed else (node,),
        master_address=master,
        master_port=int(environ.get("MASTER_PORT") or _default_port(environ)),
        **_job_fields(environ),
    )


def _default_port(environ: Mapping[str, str]) -> int:
    return rendezvous_port(
        environ.get("SLURM_JOB_ID"), _restart_count(environ), cluster=environ.get("SLURM_CLUSTER_NAME")
    )


def _job_fields(environ: Mapping[str, str]) -> dict[str, Any]:
    return {
        "job_id": environ.get("SLURM_JOB_ID"),
        "restart_count": _restart_count(environ),
        "array_job_id": environ.get("SLURM_ARRAY_JOB_ID"),
        "array_task": environ.get("SLURM_ARRAY_TASK_ID"),
        "cluster": environ.get("SLURM_CLUSTER_NAME"),
    }


def _restart_count(environ: Mapping[str, str]) -> int:
    return int(environ.get("SLURM_RESTART_COUNT") or 0)  # unset in the first attempt


def _text(environ: Mapping[str, str], *names: str) -> str:
    for name in names:
        if environ.get(name):
            return environ[name]
    raise JobError(
        f"{names[0]} is not set, though this looks like a Slurm step; start the trainer by srun with a clean environment"
    )


def _number(environ: Mapping[str, str], *names: str) -> int:
    text = _text(environ, *names)
    if not text.isdecimal():
        raise JobError(f"{names[0]} is {text!r}; it must be a whole number. Was it changed by hand?")
    return int(text)
