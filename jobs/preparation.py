"""Prepares samples, in this process or in a pool of them: from an item of a source to the bytes that go into a shard.

Light to import: each worker process imports this module and no more.
"""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import connection, get_context, parent_process
from multiprocessing.context import BaseContext
from typing import TypeVar

from cluster.errors import OutsideError
from jobs.images import BadImageError, cut_margin, decode_rgb, encode_image, fit_square, render_svg
from jobs.interruption import STOP_SIGNALS, reset_signals_in_worker
from jobs.preprocess_settings import ImageSettings
from jobs.sources import Source

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")

_CHUNK_ITEMS = 16  # handed to a worker at a time: small enough to share evenly, large enough that queues cost nothing
_CHUNKS_AHEAD = 4  # for each worker; bounds what waits in memory


@dataclass(frozen=True)
class Prepared:
    """A sample ready for its shard, or the reason why there is none."""

    name: str
    slug: str = ""
    image: bytes = b""
    caption: str = ""
    bad: str = ""
    """Why the item cannot be used; empty if it can."""


def prepare(source: Source, settings: ImageSettings, item: str) -> Prepared:
    """Load, decode, fit and encode one item. What is wrong with it is part of the answer.

    Raises:
        OutsideError: The file system fails.
    """
    try:
        raw = source.load(item, max_bytes=int(settings.max_file_mb * 1_000_000))
        if raw.is_svg:
            drawn_px = round(settings.size_px * raw.zoom)
            image = render_svg(raw.data, drawn_px, fit=settings.fit, background=settings.background)
            if raw.zoom > 1:
                image = cut_margin(image, settings.size_px)
        else:
            image = decode_rgb(
                raw.data,
                background=settings.background,
                max_pixels=int(settings.max_megapixels * 1_000_000),
                at_least_px=max(2 * settings.size_px, settings.min_side_px),
                animated=settings.animated == "first_frame",
            )
            if min(image.size) < settings.min_side_px:
                raise BadImageError(f"{image.width}x{image.height} is below image.min_side_px {settings.min_side_px}")
        image = fit_square(image, settings.size_px, fit=settings.fit, background=settings.background)
        data = encode_image(image, settings.format, quality=settings.quality)
    except BadImageError as error:
        return Prepared(source.name(item), bad=str(error))
    return Prepared(source.name(item), source.slug(item), data, raw.caption)


class Preparer:
    """Prepares items in order, by `workers` processes (by this one if it is 1)."""

    def __init__(self, source: Source, settings: ImageSettings, *, workers: int) -> None:
        self._source = source
        self._settings = settings
        self._workers = workers
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Preparer:
        if self._workers > 1:
            # spawn: a forked worker would inherit locks, the trainer's signal handlers and the lock on the run.
            context: BaseContext = get_context("spawn")
            self._pool = ProcessPoolExecutor(
                self._workers, mp_context=context, initializer=_start_worker, initargs=(self._source, self._settings)
            )
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def run(self, items: Iterator[ItemT], text: Callable[[ItemT], str]) -> Iterator[tuple[ItemT, Prepared]]:
        """Yield every item with what became of it, in order. `text` gives the source's string for an item.

        Raises:
            OutsideError: The file system fails, or a worker died (out of memory, as a rule).
        """
        if self._pool is None:
            for item in items:
                yield item, prepare(self._source, self._settings, text(item))
            return
        waiting: deque[tuple[list[ItemT], Future[list[Prepared]]]] = deque()
        try:
            for chunk in _chunks(items):
                texts = [text(item) for item in chunk]
                with _stop_signals_blocked():
                    waiting.append((chunk, self._pool.submit(_prepare_chunk, texts)))
                if len(waiting) >= self._workers * _CHUNKS_AHEAD:
                    done, future = waiting.popleft()
                    yield from zip(done, future.result(), strict=True)
            while waiting:
                done, future = waiting.popleft()
                yield from zip(done, future.result(), strict=True)
        except BrokenProcessPool as error:
            raise OutsideError(
                f"one of {self._workers} workers died, most likely killed for its memory; ask for more, or set a smaller "
                f"`workers` or `image.max_megapixels` ({self._settings.max_megapixels:g})"
            ) from error


def available_cpus(environ: Mapping[str, str], *, tasks: int) -> int:
    """Return how many CPUs this task may use.

    Args:
        environ: SLURM_CPUS_PER_TASK in it is the most.
        tasks: Tasks on this node. They share the CPUs unless Slurm has bound each to its own.
    """
    count = len(os.sched_getaffinity(0))
    if count == os.cpu_count():
        count //= tasks
    granted = environ.get("SLURM_CPUS_PER_TASK", "")
    return max(1, min(count, int(granted)) if granted.isdecimal() else count)


@contextmanager
def _stop_signals_blocked() -> Iterator[None]:
    """Hold back the signals that ask to stop while a worker may be started, which is when work is handed over.

    A new process inherits what is blocked, and so do its threads. Numpy's come into being when it is imported, before the
    worker could block anything by itself, and a signal may be delivered to any thread: it would end the worker.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Worker:
    """What a worker process was given when it started."""

    source: Source
    settings: ImageSettings


def _start_worker(source: Source, settings: ImageSettings) -> None:
    # Slurm signals every process of a step, a terminal every process in the foreground: the parent alone decides when to stop.
    # From the parent itself TERM must still work, or a pool that has lost one worker waits for the others for ever.
    reset_signals_in_worker()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _Worker.source, _Worker.settings = source, settings
    threading.Thread(target=_leave_with_parent, name="parent-watch", daemon=True).start()


def _leave_with_parent() -> None:
    """End this process when its parent is gone: after a SIGKILL it could not tell its workers, and they would stay for ever."""
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _prepare_chunk(items: list[str]) -> list[Prepared]:
    return [prepare(_Worker.source, _Worker.settings, item) for item in items]


def _chunks(items: Iterator[ItemT]) -> Iterator[list[ItemT]]:
    chunk: list[ItemT] = []
    for item in items:
        chunk.append(item)
        if len(chunk) == _CHUNK_ITEMS:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
