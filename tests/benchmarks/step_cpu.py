"""CPU time of a training step: Muster's own loop against the plain one, in one process, in turns.

CPU time, not wall time, because neighbours on the machine do not change it much; turns of a few steps each, because what they do
change they change for both. What a step includes is the same on both sides: reading and decoding pictures, noise, forward,
backward, clipping, AdamW, EMA, the learning rate, metrics and tracker.

One thread, because threads that wait for each other burn CPU time too, and the more of it the busier the machine is.

    python -m tests.benchmarks.step_cpu DIRECTORY      one measurement, of what `measure` has laid down there
"""

from __future__ import annotations

import json
import pickle
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from cluster.shell import LocalShell
from jobs.jobspec import read_job
from jobs.settings import Model, TrainConfig
from tests.benchmarks.comparison import FORGOTTEN, REPOSITORY, Case
from tests.benchmarks.pictures import SmallSet, make_pictures
from tests.benchmarks.results import Result, compare
from tests.benchmarks.scratch import scratch

TIMEOUT_S = 900.0
ORDER = "order.pickle"
MILLION = Model(channels=(32, 64, 64), layers_per_block=1)
"""1.1 million parameters, the network of facts/jobs.md."""


@dataclass(frozen=True)
class Size:
    """A network and a batch to measure with."""

    name: str
    model: Model
    batch_size: int
    rounds: int
    steps: int
    """Steps of each side in a round."""
    precision: str = "fp32"


def demo_size() -> Size:
    """Return what `make demo` trains, as its job is defined."""
    config = read_job(REPOSITORY / "jobs" / "definitions" / "train-emoji.yaml").config
    batch_size = int(config["batch_size"])
    return Size(f"the demo's, batch {batch_size}", Model(**config["model"]), batch_size=batch_size, rounds=8, steps=3)


SIZES = (
    Size("1.1 M, batch 32", MILLION, batch_size=32, rounds=8, steps=2),
    demo_size(),
    Size("6.5 M, batch 8", Model(), batch_size=8, rounds=6, steps=1),
)


def measure(sizes: tuple[Size, ...] = SIZES, *, pictures: int = 256, size_px: int = 32) -> list[Result]:
    """Measure each size in a process of its own, so that nothing of torch's state stays behind here."""
    results = []
    with scratch() as directory:
        small = make_pictures(directory, count=pictures, size_px=size_px)
        for number, size in enumerate(sizes):
            place = directory / str(number)
            place.mkdir()
            (place / ORDER).write_bytes(pickle.dumps((size, small)))
            argv = [sys.executable, "-m", "tests.benchmarks.step_cpu", str(place)]
            answer = LocalShell().run(argv, timeout_s=TIMEOUT_S, cwd=REPOSITORY)
            rounds: dict[str, list[float]] = json.loads(answer.stdout.splitlines()[-1])
            results += _results(size, rounds)
    return results


def _results(size: Size, rounds: dict[str, list[float]]) -> list[Result]:
    plain = "the plain diffusers loop"
    return [
        compare(f"step_cpu: {size.name}", rounds["ours"], rounds["plain"], other_is=plain, unit="CPU-s/step"),
        compare(
            f"step_cpu: {size.name}, channels-last",
            rounds["ours, channels-last"],
            rounds["plain"],
            other_is=plain,
            unit="CPU-s/step",
            note="model.channels_last: true; on CPUs it is off by default",
        ),
    ]


# ---- in the process of its own


def run_rounds(size: Size, pictures: SmallSet, directory: Path) -> dict[str, list[float]]:
    """Let all sides train in turns; returns the CPU-seconds of a step, by side, a figure a round."""
    case = Case(pictures=pictures, model=size.model, batch_size=size.batch_size, steps=FORGOTTEN, threads=1)
    channels_last = replace(case, model=size.model.model_copy(update={"channels_last": True}))
    with (
        _ours(case, size, directory / "ours") as ours,
        _ours(channels_last, size, directory / "channels-last") as ours_channels_last,
    ):
        plain = _plain(case, size, directory / "plain")
        sides = {"ours": ours, "plain": plain, "ours, channels-last": ours_channels_last}
        for take in sides.values():  # the first steps allocate, and choose algorithms
            take(2)
        figures: dict[str, list[float]] = {name: [] for name in sides}
        for number in range(size.rounds):
            for name in list(sides) if number % 2 else reversed(sides):
                before = time.process_time()
                sides[name](size.steps)
                figures[name].append((time.process_time() - before) / size.steps)
    return figures


@contextmanager
def _ours(case: Case, size: Size, run_directory: Path) -> Iterator[Callable[[int], None]]:
    """Set up Muster's trainer; gives a function that trains so many steps, by the trainer's own loop."""
    from cluster.yamlfile import YamlDocument, validate
    from jobs.interruption import StopSignals
    from jobs.journal import RunDirectory
    from jobs.process_group import read_rank_info
    from jobs.reporter import Reporter
    from jobs.train import run_steps
    from jobs.training import set_up

    config = validate(TrainConfig, YamlDocument(case.ours(run_directory, precision=size.precision), {}, "benchmark"))
    info, run = read_rank_info({}), RunDirectory(run_directory)
    with StopSignals() as stop:
        training = set_up(config, info, stop)
        attempt = run.begin_attempt(info, 0)
        assert attempt is not None
        with Reporter(training, attempt=attempt.number) as reporter:

            def take(steps: int) -> None:
                training.config = config.model_copy(update={"steps_to_run": training.step + steps})
                run_steps(training, run, reporter)

            yield take


def _plain(case: Case, size: Size, output: Path) -> Callable[[int], None]:
    from tests.benchmarks.plain_loop import settings_from, train

    precision = "bf16" if size.precision == "bf16" else "no"
    training = train(settings_from(case.plain(output, precision=precision, record=True)))

    def take(steps: int) -> None:
        for _ in range(steps):
            next(training)

    return take


def main(directory: Path) -> None:
    """Do one measurement and print its rounds as the last line."""
    size, pictures = pickle.loads((directory / ORDER).read_bytes())
    sys.stdout.write("\n" + json.dumps(run_rounds(size, pictures, directory)) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
