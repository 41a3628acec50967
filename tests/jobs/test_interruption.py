"""Signals set a flag and nothing else; all ranks agree on it at the same step; data workers do not hear them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from typing import Any

import pytest

from cluster.errors import InterruptedRunError, StateError
from jobs.interruption import Agreement, StopSignals, reset_signals_in_worker


def send(*numbers: signal.Signals) -> None:
    for number in numbers:
        os.kill(os.getpid(), number)


def test_the_first_request_is_kept_and_everything_is_counted() -> None:
    """Slurm's TERM, CONT, TERM is one request, SIGTERM; a later USR2 does not rename it."""
    with StopSignals() as stop:
        assert stop.requested is None
        send(signal.SIGTERM, signal.SIGCONT, signal.SIGTERM, signal.SIGUSR2)
        assert stop.requested == "SIGTERM"
        assert stop.received == {"SIGTERM": 2, "SIGCONT": 1, "SIGUSR2": 1}
        assert stop.requested_ago_s is not None


def test_cont_alone_asks_for_nothing() -> None:
    """Slurm sends it when a suspended job goes on: the run must not stop for that."""
    with StopSignals() as stop:
        send(signal.SIGCONT)
        assert stop.requested is None
        stop.raise_if_requested()


def test_earlier_handlers_are_replaced_and_come_back() -> None:
    """submitit's handlers, set before the callable runs, hear nothing meanwhile and everything afterwards."""
    heard: list[int] = []
    before = {
        number: signal.signal(number, lambda n, _: heard.append(n)) for number in (signal.SIGTERM, signal.SIGUSR2)
    }
    try:
        with StopSignals() as stop:
            send(signal.SIGUSR2)
            assert stop.requested == "SIGUSR2"
        assert heard == []
        send(signal.SIGUSR2)
        assert heard == [signal.SIGUSR2]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_handlers_come_back_after_an_error_too() -> None:
    """An exception in the block leaves no handler of ours behind."""
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ValueError, match="x"), StopSignals():
        raise ValueError("x")
    assert signal.getsignal(signal.SIGTERM) is before


def test_long_phases_can_leave_by_an_exception() -> None:
    """The exception carries exit code 75 and says which signal came and where."""
    with StopSignals() as stop:
        send(signal.SIGTERM)
        with pytest.raises(InterruptedRunError, match="SIGTERM received while loading") as caught:
            stop.raise_if_requested("while loading")
    assert caught.value.exit_code == 75


def test_only_the_main_thread_may_watch() -> None:
    """Python sets handlers only there; the message says so instead of a ValueError from signal."""
    import threading

    caught: list[BaseException] = []

    def enter() -> None:
        try:
            StopSignals().__enter__()
        except StateError as error:
            caught.append(error)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert "main thread" in str(caught[0])


def test_one_rank_agrees_with_itself_at_once_and_for_good() -> None:
    """No group is needed, and an agreed stop is not taken back."""
    agreement = Agreement.open(1)
    assert not agreement.agree(False)
    assert agreement.agree(True)
    assert agreement.agree(False)
    assert agreement.agreed


def test_several_ranks_need_a_group() -> None:
    """Without one every rank would only hear itself: refused."""
    with pytest.raises(StateError, match="gloo group"):
        Agreement(world_size=2)


def run_rank(rank: int, world_size: int, port: int, scenario: str, answers: Any) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    agreement = Agreement.open(world_size)
    stopped = None
    for step in range(50):
        wants = step >= 7 and rank == 2
        if rank == 1:
            time.sleep(0.005)  # a slower rank must not stop elsewhere
        if scenario == "now" and step == 7:
            if agreement.agree_now(wants):
                stopped = step
                break
        elif agreement.agree(wants):
            stopped = step
            break
    agreement.close()
    answers.put((rank, stopped))
    dist.barrier()
    dist.destroy_process_group()


def agreed_steps(scenario: str) -> dict[int, int]:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    ranks = [
        context.Process(target=run_rank, args=(rank, 3, port, scenario, answers), daemon=True) for rank in range(3)
    ]
    for process in ranks:
        process.start()
    try:
        return dict(answers.get(timeout=90) for _ in ranks)
    finally:
        for process in ranks:
            process.join(timeout=10)
            process.kill()


def test_all_ranks_stop_at_the_same_step_though_one_was_asked() -> None:
    """Rank 2 asks from step 7 on; everybody leaves at step 8, one step later."""
    assert agreed_steps("late") == {0: 8, 1: 8, 2: 8}


def test_agree_now_answers_within_the_same_step() -> None:
    """In a long loop the wish of step 7 counts at step 7, with a reduction of an earlier step still under way."""
    assert agreed_steps("now") == {0: 7, 1: 7, 2: 7}


def worker(ready: Any, how: str) -> None:
    signal.signal(signal.SIGTERM, lambda *_: None)  # what a forked worker inherits
    if how == "reset":
        reset_signals_in_worker(0)
    ready.set()
    time.sleep(60)


@pytest.fixture
def data_worker() -> Any:
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=worker, args=(ready, "reset"), daemon=True)
    process.start()
    assert ready.wait(60)
    yield process
    process.kill()
    process.join()


def test_a_worker_is_deaf_to_signals_from_outside(data_worker: Any) -> None:
    """Slurm's daemon (here: another process) sends TERM and USR2 to every process of a step; the worker lives on."""
    import subprocess

    for name in ("TERM", "USR2", "TERM"):
        subprocess.run(["kill", f"-{name}", str(data_worker.pid)], check=True)
    data_worker.join(timeout=1.0)
    assert data_worker.is_alive()


def test_a_worker_still_obeys_its_parent(data_worker: Any) -> None:
    """terminate(), with which torch puts away a worker that does not leave, ends it."""
    data_worker.terminate()
    data_worker.join(timeout=10)
    assert data_worker.exitcode == 0


def test_the_trainers_own_handlers_do_not_reach_a_data_loaders_workers() -> None:
    """A DataLoader with worker_init_fn goes on delivering while its workers are signalled from outside."""
    import subprocess

    from torch.utils import data

    class Slow(data.Dataset[int]):
        def __len__(self) -> int:
            return 40

        def __getitem__(self, index: int) -> int:
            time.sleep(0.01)
            return index

    with StopSignals() as stop:
        loader = data.DataLoader(Slow(), batch_size=4, num_workers=2, worker_init_fn=reset_signals_in_worker)
        batches = iter(loader)
        seen = [next(batches).tolist()]
        workers = [process.pid for process in multiprocessing.active_children()]
        assert len(workers) == 2
        for pid in workers:
            subprocess.run(["kill", "-TERM", str(pid)], check=True)
        seen += [batch.tolist() for batch in batches]
    assert sorted(number for batch in seen for number in batch) == list(range(40))
    assert stop.requested is None
