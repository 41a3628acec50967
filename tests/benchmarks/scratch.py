"""A directory for one benchmark, with whatever clusters it starts; nothing of either is left afterwards."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.errors import MusterError
from cluster.local import LocalCluster

CLUSTERS = "c"
"""Where in it clusters live. Short, as paths of sockets are limited."""
_PREFIX = "muster-bench-"


@contextmanager
def scratch() -> Iterator[Path]:
    """Give a directory that every process of this machine may enter; it is removed at the end."""
    _remove_what_killed_runs_left()
    directory = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir="/tmp"))
    directory.chmod(0o755)
    try:
        yield directory
    finally:
        _remove(directory)


def _remove_what_killed_runs_left() -> None:
    """Remove what runs that were killed could not: their pid stands in the directory's name."""
    for directory in Path("/tmp").glob(f"{_PREFIX}*-*"):
        pid = directory.name.removeprefix(_PREFIX).partition("-")[0]
        if pid.isdigit() and not Path("/proc", pid).exists() and directory.stat().st_uid == os.geteuid():
            _remove(directory)


def _remove(directory: Path) -> None:
    root = directory / CLUSTERS
    for cluster in root.iterdir() if root.is_dir() else []:
        with contextlib.suppress(MusterError):  # no cluster any more: it goes with the rest
            LocalCluster(cluster.name, root=root).down()
    shutil.rmtree(directory, ignore_errors=True)
