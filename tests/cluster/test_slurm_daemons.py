"""SlurmCliClient against the real daemons: what it asks is answered, what it orders happens."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest

from cluster.errors import InputError, MissingError, NotFoundError, SlurmError, StateError
from cluster.local import LocalCluster
from cluster.shell import LocalShell
from cluster.slurm import SlurmCliClient
from cluster.slurm_queue import standing
from cluster.slurm_records import Job

pytestmark = pytest.mark.daemons

SLEEP = "#!/bin/sh\nexec srun sleep 300\n"


@pytest.fixture
def client(local_cluster: LocalCluster) -> Iterator[SlurmCliClient]:
    """A client of the session's cluster, which is left idle afterwards."""
    client = SlurmCliClient(environment=local_cluster.environment())
    yield client
    left = [job.id for job in client.jobs() if not job.is_ended]
    if left:
        client.cancel(left)
        wait_for(lambda: all(job.is_ended for job in client.jobs(job_ids=left)))
    client.resume([node.name for node in client.nodes() if node.is_draining] or [client.nodes()[0].name])


def wait_for(is_so: Callable[[], object], *, timeout_s: float = 60.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline_s, "waited too long"
        time.sleep(0.3)


def job_in(client: SlurmCliClient, job_id: str, *states: str) -> Job:
    """Wait until the job is in one of these states and return it."""
    wait_for(lambda: client.job(job_id).state in states)
    return client.job(job_id)


def submit(client: SlurmCliClient, *arguments: str, script: str = SLEEP) -> str:
    return client.submit(script, arguments=["--output=/dev/null", *arguments])


def test_the_cluster_answers_every_question(client: SlurmCliClient) -> None:
    """Version, ping, configuration, nodes with their GPUs, and the two partitions over the same nodes."""
    assert client.version().major >= 21
    assert [status.is_up for status in client.ping()] == [True]
    assert client.configuration()["PreemptType"] == "preempt/partition_prio"
    nodes = client.nodes()
    assert len(nodes) >= 2
    assert all(node.is_usable and node.gpu_count > 0 for node in nodes)
    partitions = {partition.name: partition for partition in client.partitions()}
    assert (partitions["high"].tier or 0) > (partitions["low"].tier or 0)
    assert partitions["low"].preempt_mode == "REQUEUE"
    assert partitions["low"].nodes == partitions["high"].nodes == tuple(node.name for node in nodes)


def test_text_and_json_agree_about_a_live_job(client: SlurmCliClient) -> None:
    """A nasty name and comment come back as given, whichever way the job is read."""
    name = "a b=c \"d\" 'e' Ünï | UserId=x(0)"
    job_id = submit(client, "--gres=gpu:2", f"--job-name={name}", "--comment=JobState=FAILED x", "--time=7")
    one = job_in(client, job_id, "RUNNING")
    several = client.jobs(job_ids=[job_id, "999999"])
    assert [job.id for job in several] == [job_id]
    for job in (one, several[0]):
        assert job.name == name
        assert job.comment == "JobState=FAILED x"
        assert job.state == "RUNNING"
        assert job.gpu_count == 2
        assert job.time_limit is not None
        assert job.time_limit.total_seconds() == 420
        assert [len(indices) for indices in job.gpus_by_node.values()] == [2]
        assert job.start_time == one.start_time
    assert client.node(one.nodes[0]).gpu_allocated_count == 2


def test_a_requeued_job_waits_and_has_two_attempts_on_record(client: SlurmCliClient) -> None:
    """Requeue keeps the id; the hold can be cut short with StartTime=now; accounting has both attempts."""
    job_id = submit(client)
    job_in(client, job_id, "RUNNING")
    client.requeue(job_id, hold=True)
    job = job_in(client, job_id, "PENDING")
    assert job.is_held
    assert job.restarts == 1
    with pytest.raises(StateError):
        client.requeue(job_id)
    client.release(job_id)
    client.update_job(job_id, StartTime="now")
    job_in(client, job_id, "RUNNING")
    client.cancel([job_id])
    job_in(client, job_id, "CANCELLED")
    wait_for(lambda: len(client.accounting(job_ids=[job_id])) == 2)
    wait_for(lambda: client.accounting(job_ids=[job_id])[-1].end_time is not None)
    first, second = client.accounting(job_ids=[job_id])
    assert (first.state, first.restarts) == ("REQUEUED", 0)
    assert (second.state, second.restarts) == ("CANCELLED", 1)


def test_excluded_nodes_are_kept_from_a_waiting_job(client: SlurmCliClient) -> None:
    """ExcNodeList takes a folded list; the job then starts on another node."""
    names = [node.name for node in client.nodes()]
    job_id = submit(client, "--hold")
    client.update_job(job_id, ExcNodeList=",".join(names[:-1]))
    assert client.job(job_id).excluded_nodes == tuple(names[:-1])
    assert client.job(job_id).is_held
    assert client.expected_start(job_id) is None
    client.release(job_id)
    assert job_in(client, job_id, "RUNNING").nodes == (names[-1],)


def test_drain_and_resume_change_the_node_and_keep_the_reason(client: SlurmCliClient) -> None:
    """The reason comes back letter by letter; resuming a node that is in service is no error."""
    reason = "muster: Xid 79 on GPU 3 [see=ticket 12] 'it' \"is\" é"
    names = [node.name for node in client.nodes()][:2]
    client.drain(names[:1], reason=reason)
    node = client.node(names[0])
    assert (node.is_draining, node.is_usable, node.reason) == (True, False, reason)
    assert node.reason_time is not None
    client.resume(names)
    assert all(not node.is_draining for node in client.nodes(names))
    client.resume(names)


def test_a_waiting_job_can_be_explained(client: SlurmCliClient) -> None:
    """Reason, who holds the nodes, what its priority is made of."""
    count = len(client.nodes())
    holder = submit(client, f"--nodes={count}", "--exclusive", "--partition=high")
    job_in(client, holder, "RUNNING")
    waiting = submit(client, f"--nodes={count}", "--partition=low")
    wait_for(lambda: client.job(waiting).reason is not None)
    job = client.job(waiting)
    result = standing(job, jobs=client.jobs(), partitions=client.partitions())
    assert (result.position, [other.id for other in result.holders]) == (1, [holder])
    wait_for(lambda: client.priorities([waiting]))
    (priority,) = client.priorities([waiting])
    assert priority.job_id == waiting
    assert priority.factors["partition"] >= 0


def test_a_signal_reaches_the_job(client: SlurmCliClient) -> None:
    """cancel with a signal and batch=True signals the batch shell, which ends with its own code."""
    job_id = submit(client, "--no-requeue", script="#!/bin/bash\ntrap 'exit 7' USR2\nsleep 300 & wait\n")
    job_in(client, job_id, "RUNNING")
    time.sleep(1)  # the shell needs a moment to set its trap
    client.cancel([job_id], signal="USR2", batch=True)
    assert job_in(client, job_id, "FAILED").exit_code == 7


def test_slurms_refusals_are_our_exceptions(client: SlurmCliClient) -> None:
    """The real messages of the running version are recognised."""
    with pytest.raises(NotFoundError):
        client.job("999999")
    with pytest.raises(NotFoundError):
        client.requeue("999999")
    with pytest.raises(NotFoundError):
        client.drain(["no-such-node"], reason="x")
    with pytest.raises(SlurmError, match="sinfo -s"):
        submit(client, "--partition=nope")
    with pytest.raises(SlurmError, match="sacctmgr show assoc"):
        submit(client, "--account=nope")
    with pytest.raises(SlurmError, match="no node of the partition"):
        submit(client, "--gres=gpu:99")
    client.cancel(["999999"])
    job_id = submit(client, "--hold", "--array=1-3")
    assert {job.display_id for job in client.jobs(job_ids=[job_id])} == {f"{job_id}_[1-3]"}
    client.release(f"{job_id}_2")
    wait_for(lambda: len(client.jobs(job_ids=[job_id])) > 1)
    with pytest.raises((InputError, NotFoundError)):
        client.job(job_id)


def test_without_a_slurm_conf_the_message_says_what_to_run(tmp_path_factory: pytest.TempPathFactory) -> None:
    """`scontrol` finds no configuration on a bare machine."""
    shell = LocalShell()
    probe = shell.run(["env", "-u", "SLURM_CONF", "scontrol", "--version"], timeout_s=60, check=False)
    if probe.returncode == 0:
        pytest.skip("this machine has a slurm.conf of its own")
    missing = tmp_path_factory.mktemp("none") / "slurm.conf"
    with pytest.raises(MissingError, match="muster local env"):
        SlurmCliClient(environment={"SLURM_CONF": str(missing)}).nodes()
