"""Reading a log that is still being written, also while its job goes back to the queue and comes again."""

from __future__ import annotations

import codecs
import os
from collections.abc import Callable, Iterator
from pathlib import Path

_CHUNK_BYTES = 1 << 16


def read_tail(path: Path, lines: int | None) -> tuple[str, int]:
    """Return the last `lines` of a file (all of it for None), and the offset from which to go on.

    That is its end, or where a last character begins of which only some bytes are there yet.
    """
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        start = 0
        if lines is not None:
            start, found = end, 0
            # One more newline than lines: the one that ends the line before the first wanted.
            while start > 0 and found <= lines:
                start = max(0, start - _CHUNK_BYTES)
                file.seek(start)
                found = file.read(end - start).count(b"\n")
        file.seek(start)
        data = file.read(end - start)
    if lines is not None:
        data = b"".join(data.splitlines(keepends=True)[-lines:]) if lines else b""
    decoder = _decoder()
    text = decoder.decode(data)
    return text, end - len(decoder.getstate()[0])


def follow(
    path: Path,
    *,
    offset: int,
    is_over: Callable[[], bool],
    sleep: Callable[[float], None],
    poll_s: float = 0.5,
    ask_every: int = 10,
) -> Iterator[str]:
    """Yield what is added to a file from `offset` on, until the job is over and everything has been read.

    The file may not exist yet, and may be gone for a moment; a file that has become shorter (a job without append mode that was
    requeued) is read from its start.

    Args:
        path: The log.
        offset: Where to begin.
        is_over: Says whether the job has ended for good; asked at every `ask_every`th look.
        sleep: Waits that many seconds.
        poll_s: Seconds between looks.
        ask_every: Looks between questions to Slurm.
    """
    looks = 0
    decoder = _decoder()  # one for the whole file: a character may come in two parts
    while True:
        over = looks % ask_every == 0 and is_over()  # asked before the last read: what comes in between is still read
        looks += 1
        while True:
            chunk, end = _read_on(path, offset)
            if end < offset + len(chunk):  # the file was emptied, and begins anew
                decoder.reset()
            offset = end
            if not chunk:
                break
            text = decoder.decode(chunk)
            if text:
                yield text
        if over:
            rest = decoder.decode(b"", final=True)
            if rest:
                yield rest
            return
        sleep(poll_s)


def _decoder() -> codecs.IncrementalDecoder:
    return codecs.getincrementaldecoder("utf-8")("replace")


def _read_on(path: Path, offset: int) -> tuple[bytes, int]:
    try:
        with path.open("rb") as file:
            if file.seek(0, os.SEEK_END) < offset:
                offset = 0
            file.seek(offset)
            chunk = file.read(_CHUNK_BYTES)
    except FileNotFoundError:
        return b"", offset
    return chunk, offset + len(chunk)
