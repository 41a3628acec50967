"""A trainer without the training: every call that ties a run to Slurm, steps that sleep, a checkpoint that is one number.

    standin_trainer.py RUN STEPS [gloo] [crash|crash-always|killed]

With `gloo` the ranks join a process group and agree as real ones do; without, nothing of torch is loaded.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from jobs.collectives import LoneRank, Ranks, TorchRanks
from jobs.interruption import Agreement, StopSignals
from jobs.journal import RunDirectory
from jobs.process_group import open_process_group, read_rank_info
from jobs.requeue import Requeuer, quit_now

STEP_S = 0.1
SAVE_EVERY = 10
FAULT_AT = 15
RETRIES = 2


def train(directory: str, steps: int, modes: tuple[str, ...] = ()) -> int:
    """Run one rank of one attempt; returns its exit code."""
    with StopSignals() as stop:
        info = read_rank_info(os.environ)
        run = RunDirectory(Path(directory), heartbeat_s=0.5)
        requeuer = Requeuer(info, run, stop=stop, retries=RETRIES)
        step = 0

        def say(*words: object) -> None:
            print(f"{time.time():.2f} attempt {info.restart_count} rank {info.rank} {info.node}:", *words, flush=True)

        try:
            ranks: Ranks = LoneRank()
            agreement = Agreement()
            if "gloo" in modes:
                open_process_group(info, 90, stop=stop)
                ranks, agreement = TorchRanks(), Agreement.open(info.world_size)
            checkpoint = run.path / "checkpoint"
            step = int(checkpoint.read_text()) if checkpoint.exists() else 0
            run.begin_attempt(info, step, retries=RETRIES, is_job_alive=requeuer.is_job_alive, explain=requeuer.explain)
            ranks.broadcast(None)
            say("begins at", step, "port", info.master_port)
            while step < steps:
                if agreement.agree(stop.requested is not None):
                    save(run, info.is_first, checkpoint, step)
                    code = requeuer.leave(step, ranks=ranks if "gloo" in modes else None)
                    say("leaves at", step, "with", code, stop.received)
                    return code
                time.sleep(STEP_S)
                step += 1
                run.note_step(step)
                fault(modes, info, step)
                if step % SAVE_EVERY == 0:
                    save(run, info.is_first, checkpoint, step)
            if info.is_first:
                run.mark_finished(step)
            ranks.broadcast(None)
            say("finished")
            return 0
        except Exception as error:
            say("fails:", error)
            code = requeuer.leave_after_crash(error, step=step)
            say("leaves after its failure with", code)
            return code


def save(run: RunDirectory, is_first: bool, checkpoint: Path, step: int) -> None:
    """Commit the state, which is the step."""
    if is_first:
        beside = checkpoint.with_name("checkpoint.new")
        beside.write_text(str(step))
        beside.replace(checkpoint)
        run.note_commit(step)


def fault(modes: tuple[str, ...], info: Any, step: int) -> None:
    """Fail on the last rank in the middle of a run, in the first attempt or always from the same step."""
    if info.rank != info.world_size - 1:
        return
    if "crash" in modes and step == FAULT_AT and info.restart_count == 0:
        raise ValueError("the loss is not a number")
    if "crash-always" in modes and step >= FAULT_AT:
        raise ValueError("the loss is not a number")
    if "killed" in modes and step == FAULT_AT and info.restart_count == 0:
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    quit_now(train(sys.argv[1], int(sys.argv[2]), tuple(sys.argv[3:])))
