"""Samples repeated and missed after a SIGKILL in the middle of an epoch, between two checkpoints.

Both sides train the same network on the same pictures, save after the same step, are killed after the same step, are started
again and finish the epoch. Then it is counted what they read: over the steps that the finished run is made of, that is those up
to the checkpoint by the first attempt, and the rest by the second.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from jobs.records import SampleCount, count_samples, read_json_lines
from jobs.settings import Model
from tests.benchmarks.comparison import Case, kill, our_command, plain_command, running, wait_for_end, wait_for_step
from tests.benchmarks.pictures import make_pictures
from tests.benchmarks.results import Result
from tests.benchmarks.scratch import scratch

TIMEOUT_S = 240.0
TINY = Model(channels=(16, 32), layers_per_block=1, attention=(False, False))
"""Which samples come does not depend on the network."""


def measure(
    *, pictures: int = 256, batch_size: int = 16, saved_after: int = 10, killed_after: int = 13, model: Model = TINY
) -> list[Result]:
    """Kill both sides and count. The defaults are those of facts/jobs.md: 16 steps an epoch, 96 samples left at the checkpoint."""
    epoch = pictures // batch_size
    left = (epoch - saved_after) * batch_size
    with scratch() as directory:
        small = make_pictures(directory, count=pictures)
        case = Case(pictures=small, model=model, batch_size=batch_size, steps=epoch, checkpoint_every=saved_after)

        def ours(_attempt: int) -> list[str]:
            sampling = {"count": 1, "inference_steps": 1}
            config = case.ours(directory / "ours", record_samples=True, sampling=sampling)
            return our_command(config, directory / "train.yaml")

        def plain(attempt: int) -> list[str]:
            resumed = {"attempt": attempt, "resume": attempt > 1}
            return plain_command(case.plain(directory / "plain", record=True, **resumed))

        for output, command in (("ours", ours), ("plain", plain)):
            _kill_and_resume(command, directory / output, killed_after, log=directory / f"{output}.log")
        samples = {
            output: _count(directory / output, keys=small.keys, batch_size=batch_size) for output in ("ours", "plain")
        }
    note = f"of the {left} samples left at the checkpoint (step {saved_after} of {epoch}); SIGKILL after step {killed_after}"
    results = []
    for what in ("repeated", "missed"):
        mine, theirs = getattr(samples["ours"], what), getattr(samples["plain"], what)
        results.append(
            Result(
                name=f"resume_exactness: {what}",
                ours=mine,
                other=theirs,
                other_is="accelerate's own resume",
                unit="samples",
                ratio=mine / theirs if theirs else None,
                note=note,
            )
        )
    return results


def _kill_and_resume(command: Callable[[int], list[str]], output: Path, killed_after: int, *, log: Path) -> None:
    """Run a trainer, kill it once `killed_after` steps are done, and run it again to its end."""
    with running(command(1), log=log) as process:
        wait_for_step(process, output / "metrics.jsonl", killed_after - 1, log=log, timeout_s=TIMEOUT_S)
        kill(process)
    with running(command(2), log=log) as process:
        wait_for_end(process, log=log, timeout_s=TIMEOUT_S)


def _count(output: Path, *, keys: Sequence[str], batch_size: int) -> SampleCount:
    return count_samples(read_json_lines(output / "samples-rank0.jsonl"), keys=keys, batch_size=batch_size)
