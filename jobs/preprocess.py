"""The preprocessing job: pictures in, WebDataset shards with their index out.

    python -m jobs.preprocess --config FILE [--set key=value ...] [--json]

Under Slurm every task takes every n-th shard; whoever finishes last writes the index. A task that is preempted drops the shard
it is in, exits 75 and finds the finished ones done when it comes back.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import logging
import os
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

from cluster.errors import InterruptedRunError, JobError, MusterError, OutsideError
from jobs.interruption import StopSignals
from jobs.preparation import Prepared, Preparer, available_cpus
from jobs.preprocess_output import ItemList, PreprocessOutput
from jobs.preprocess_settings import PreprocessConfig, load_preprocess_config
from jobs.process_group import RankInfo, read_rank_info
from jobs.shard_index import Manifest
from jobs.shard_scan import BadSample, ShardPart, ShardRecord, scan_shard
from jobs.shards import new_shard, shard_key, shard_name
from jobs.sources import Source, make_source

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

logger = logging.getLogger(__name__)

_BAD_IN_LOG = 50


@dataclass(frozen=True)
class Summary:
    """How a task ended."""

    output: str
    finished: bool
    """Whether the whole run is done; if not, other tasks are still at work."""
    samples: int
    """Samples of the whole set, or of this task's shards as long as others are at work."""
    shards: int
    """As `samples`."""
    bad: int
    """As `samples`."""
    images_made: int
    """Pictures that this task went through in this attempt, bad ones included."""
    seconds: float
    """Time that took, the start of the workers included."""
    images_per_s: float
    fingerprint: str
    """Identity of the finished set; empty before."""

    def __str__(self) -> str:
        state = "finished" if self.finished else "this task is done, others are at work"
        return (
            f"{self.output}: {state}: {self.samples} samples in {self.shards} shards, {self.bad} bad; "
            f"{self.images_made} pictures in {self.seconds:.1f} s, {self.images_per_s:.0f} images/s"
        )


class Stop(Protocol):
    """What a run asks whether it should leave (`jobs.interruption.StopSignals`)."""

    def raise_if_requested(self, where: str = "") -> None:
        """Raise InterruptedRunError if a stop was asked for."""


def main(config: PreprocessConfig | Mapping[str, Any]) -> int:
    """Run one task of the preprocessing that `config` describes, and return 0.

    Raises:
        JobError: A setting is wrong, there are no pictures, or too many are bad.
        StateError: The output directory holds something else, or another run is writing into it.
        OutsideError: The file system fails or is full, or a worker died.
        InterruptedRunError: Slurm asked for the node; the rest waits for the next attempt.
    """
    if not isinstance(config, PreprocessConfig):
        from cluster.yamlfile import YamlDocument, validate

        config = validate(PreprocessConfig, YamlDocument(dict(config), {}, "config"), error_type=JobError)
    with StopSignals() as stop:
        summary = preprocess(config, read_rank_info(os.environ), stop=stop)
    logger.info("%s", summary)
    return 0


def preprocess(config: PreprocessConfig, rank: RankInfo, *, stop: Stop) -> Summary:
    """Make this task's shards, and finish the set if they were the last; raises as `main` does."""
    started_s = time.monotonic()
    output = PreprocessOutput(config)
    source = make_source(config.source)
    with output.claimed(_owner(rank)):
        manifest = output.finished()
        if manifest is not None:
            logger.info("%s is finished already", output.directory)
            return _summary(output, manifest, made=0, seconds=0.0)
        items = output.items(_watched(source.list_items(), stop))
        if not items:
            raise JobError(
                f"source {source.description.source}: nothing there fits; look at the settings under `source`"
            )
        shards = -(-len(items) // config.samples_per_shard)
        task = _Task(config, rank, output, source, items, stop)
        made = task.make_shards(range(rank.rank, shards, rank.world_size))
        manifest = output.finish(shards, items=len(items), description=source.description)
        seconds = time.monotonic() - started_s
        if manifest is not None:
            return _summary(output, manifest, made=made, seconds=seconds)
        own = [part.record for part in task.parts]
        return Summary(
            str(output.directory), False, sum(r.samples for r in own), len(own), sum(r.bad for r in own),
            made, seconds, made / seconds, "",
        )  # fmt: skip


class _Task:
    """One task's share of a run."""

    def __init__(
        self,
        config: PreprocessConfig,
        rank: RankInfo,
        output: PreprocessOutput,
        source: Source,
        items: ItemList,
        stop: Stop,
    ) -> None:
        self._config = config
        self._rank = rank
        self._output = output
        self._source = source
        self._items = items
        self._stop = stop
        self._bad: list[BadSample] = []
        self.parts: list[ShardPart] = []

    def make_shards(self, numbers: Sequence[int]) -> int:
        """Make the shards that are not done; return how many pictures that took."""
        todo = []
        for number in numbers:
            self._stop.raise_if_requested("while looking at what is done")
            part = self._output.done_part(number)
            if part is None:
                todo.append(number)
            else:
                self._note(part)
        total = sum(len(self._item_numbers(number)) for number in todo)
        if len(todo) < len(numbers):
            logger.info("%d of %d shards are done already", len(numbers) - len(todo), len(numbers))
        workers = min(
            self._config.workers or available_cpus(os.environ, tasks=self._rank.local_world_size), max(1, total)
        )
        wanted = ((shard, item) for shard in todo for item in self._item_numbers(shard))
        with (
            _progress(total, interval_s=self._config.progress_interval_s) as progress,
            Preparer(self._source, self._config.image, workers=workers) as preparer,
        ):
            results = preparer.run(wanted, lambda place: str(self._items[place[1]]))
            try:
                for shard, group in itertools.groupby(results, key=lambda result: result[0][0]):
                    self._make_shard(shard, ((item, prepared) for (_, item), prepared in group), progress)
            except OutsideError:
                # A worker that Slurm's signal met before it could turn a deaf ear takes the pool with it.
                self._stop.raise_if_requested("and a worker died of it")
                raise
        return progress.done

    def _make_shard(self, number: int, results: Iterator[tuple[int, Prepared]], progress: _Reporter) -> None:
        bad: list[BadSample] = []
        path = self._output.directory / shard_name(number)
        with new_shard(path) as writer:
            for item, prepared in results:
                self._stop.raise_if_requested(f"in shard {number}, which is dropped")
                if prepared.bad:
                    bad.append(BadSample(prepared.name, prepared.bad))
                    self._name_bad(bad)
                else:
                    writer.add(
                        shard_key(item, prepared.slug),
                        image=prepared.image,
                        extension=self._config.image.extension,
                        caption=prepared.caption,
                    )
                progress.advance(bad=bool(prepared.bad))
        self._output.save_part(number, self._read_back(path, writer.samples, bad))

    def _read_back(self, path: Path, samples: int, bad: list[BadSample]) -> ShardPart:
        """Scan a shard just written: this makes its part of the index, and proves that it can be read."""
        part = scan_shard(path)
        if part.bad or part.record.samples != samples:
            raise OutsideError(
                f"{path}: {part.record.samples} of the {samples} samples just written can be read back; "
                "the disk or the file system is failing"
            )
        record = dataclasses.replace(part.record, bad=len(bad))
        if not samples:  # every item was bad: no tar file, only the record of what was wrong
            path.unlink()
            record = ShardRecord(name=path.name, size=0, sha256="", samples=0, bad=len(bad))
        part = dataclasses.replace(part, record=record, bad=tuple(bad))
        self._note(part)
        return part

    def _note(self, part: ShardPart) -> None:
        self.parts.append(part if part.record.samples == 0 else dataclasses.replace(part, rows=part.rows[:0], keys=b""))
        self._bad += part.bad
        self._name_bad([])

    def _name_bad(self, newest: Sequence[BadSample]) -> None:
        """Name the last of `newest` in the log, and stop the run if there are too many by now."""
        count = len(self._bad) + len(newest)
        if newest and count <= _BAD_IN_LOG:
            more = (
                f"; further ones are named in {self._output.directory} at the end only" if count == _BAD_IN_LOG else ""
            )
            logger.warning("bad picture %s: %s%s", *newest[-1], more)
        if count > self._config.bad_allowed(len(self._items)):
            raise self._output.too_many_bad([*self._bad, *newest], len(self._items))

    def _item_numbers(self, shard: int) -> range:
        size = self._config.samples_per_shard
        return range(shard * size, min((shard + 1) * size, len(self._items)))


class _Reporter:
    """Counts, and says so: a bar on a terminal, a line now and then in a log."""

    def __init__(self, total: int, bar: tuple[Progress, TaskID] | None, *, interval_s: float) -> None:
        self.done = 0
        self._bad = 0
        self._total = total
        self._bar = bar
        self._interval_s = interval_s
        self._started_s = self._said_s = time.monotonic()

    def __enter__(self) -> _Reporter:
        if self._bar is not None:
            self._bar[0].start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar[0].stop()

    def advance(self, *, bad: bool) -> None:
        self.done += 1
        self._bad += bad
        now_s = time.monotonic()
        rate = self.done / max(now_s - self._started_s, 1e-9)
        if self._bar is not None:
            self._bar[0].update(self._bar[1], completed=self.done, bad=self._bad, rate=rate)
        elif now_s - self._said_s >= self._interval_s or self.done == self._total:
            self._said_s = now_s
            logger.info(
                "%d of %d images (%.0f %%), %d bad, %.0f images/s, %.0f s left",
                self.done, self._total, 100 * self.done / self._total, self._bad, rate, (self._total - self.done) / rate,
            )  # fmt: skip


def _progress(total: int, *, interval_s: float) -> _Reporter:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from cluster.output import error_console

    console = error_console()
    if not console.is_terminal or not total:
        return _Reporter(total, None, interval_s=interval_s)
    bar = Progress(
        TextColumn("preprocessing"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[bad]} bad"),
        TextColumn("{task.fields[rate]:.0f} images/s"), TimeRemainingColumn(), console=console,
    )  # fmt: skip
    return _Reporter(total, (bar, bar.add_task("", total=total, bad=0, rate=0.0)), interval_s=interval_s)


def _summary(output: PreprocessOutput, manifest: Manifest, *, made: int, seconds: float) -> Summary:
    return Summary(
        output=str(output.directory),
        finished=True,
        samples=manifest.samples,
        shards=sum(1 for record in manifest.shards if record.samples),
        bad=manifest.bad,
        images_made=made,
        seconds=seconds,
        images_per_s=made / seconds if seconds else 0.0,
        fingerprint=manifest.fingerprint,
    )


def _owner(rank: RankInfo) -> str:
    """Return the name under which this run holds its output: the same for all tasks and attempts of a Slurm job."""
    if rank.job_id is not None:
        return f"Slurm job {rank.job_id}"
    if rank.world_size > 1:
        return f"the launcher at {rank.master_address}:{rank.master_port}"
    return f"process {os.getpid()} on {socket.gethostname()}"


def _watched(items: Iterator[str], stop: Stop) -> Iterator[str]:
    for item in items:
        stop.raise_if_requested("while listing the pictures")
        yield item


def _run_command_line(argv: Sequence[str] | None = None) -> int:
    from cluster.output import error_console, print_json, set_up_logging

    parser = argparse.ArgumentParser(
        prog="python -m jobs.preprocess", description="Make WebDataset shards of pictures."
    )
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="a PreprocessConfig in YAML")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a key, as image.size_px=32"
    )
    parser.add_argument("--json", action="store_true", help="print the summary as JSON on standard output")
    options = parser.parse_args(argv)
    set_up_logging(1)
    try:
        config = load_preprocess_config(options.config, options.set)
        with StopSignals() as stop:
            summary = preprocess(config, read_rank_info(os.environ), stop=stop)
    except MusterError as error:
        message = str(error) if isinstance(error, InterruptedRunError) else f"error: {error}"
        error_console().print(message, soft_wrap=True, highlight=False, markup=False)
        return error.exit_code
    if options.json:
        print_json(dataclasses.asdict(summary))
    else:
        error_console().print(str(summary), soft_wrap=True, highlight=False, markup=False)
    return 0


if __name__ == "__main__":
    sys.exit(_run_command_line())
