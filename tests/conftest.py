"""Fixtures for every test: a real Slurm cluster on this machine, one for all tests of the session, and more on request."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import MissingError, MusterError
from cluster.local import LocalCluster
from cluster.settings import ClusterSpec, load_spec
from cluster.shell import find_program

LOCAL_DEMO = Path(__file__).parent.parent / "templates" / "cluster" / "local-demo.yaml"

_PREFIX = "muster-test-"

MakeCluster = Callable[..., LocalCluster]
"""`make_cluster(**changes)`: start a cluster whose description is local-demo's with these top-level keys replaced."""


@pytest.fixture(scope="session")
def cluster_root() -> Iterator[Path]:
    """A short directory for clusters (socket paths are limited) that other users can enter, gone afterwards."""
    _remove_what_killed_sessions_left()
    root = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir="/tmp"))
    root.chmod(0o755)
    yield root
    _remove(root)


@pytest.fixture
def short_path() -> Iterator[Path]:
    """An empty directory whose own path is short: pytest's are too long for the sockets of a cluster under `pytest -n`."""
    directory = Path(tempfile.mkdtemp(prefix="m-", dir="/tmp"))
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="session")
def local_cluster(cluster_root: Path) -> LocalCluster:
    """The session's cluster: templates/cluster/local-demo.yaml as it stands. Leave it as found: idle nodes, no jobs."""
    _skip_without_programs()
    cluster = LocalCluster(f"session-{os.getpid()}", root=cluster_root)  # its name is in the ports where ranks meet
    cluster.up(load_spec(LOCAL_DEMO))
    return cluster


@pytest.fixture
def make_cluster(cluster_root: Path) -> Iterator[MakeCluster]:
    """Starts clusters with other settings, and ends them after the test."""
    _skip_without_programs()
    made: list[LocalCluster] = []

    def make(*, nodes: int | None = None, **changes: Any) -> LocalCluster:
        spec = load_spec(LOCAL_DEMO)
        if nodes is not None:
            changes.setdefault("pools", (spec.pools[0].model_copy(update={"nodes": nodes}),))
        spec = ClusterSpec.model_validate({**spec.model_dump(), **_plain(changes)})
        cluster = LocalCluster(f"extra-{os.getpid()}-{len(made)}", root=cluster_root)
        made.append(cluster)
        cluster.up(spec)
        return cluster

    yield make
    for cluster in made:
        if cluster.layout.directory.is_dir():
            cluster.down()


def _remove_what_killed_sessions_left() -> None:
    """End the clusters of test sessions that were killed before they could: their pid stands in the directory's name."""
    for root in Path("/tmp").glob(f"{_PREFIX}*-*"):
        pid = root.name.removeprefix(_PREFIX).partition("-")[0]
        if pid.isdigit() and not Path("/proc", pid).exists() and root.stat().st_uid == os.geteuid():
            _remove(root)


def _remove(root: Path) -> None:
    clusters = [entry for entry in root.iterdir() if entry.is_dir()] if root.is_dir() else []
    for directory in clusters:
        with contextlib.suppress(MusterError):  # not a cluster's: it goes with the rest
            LocalCluster(directory.name, root=root).down()
    shutil.rmtree(root, ignore_errors=True)


def _plain(value: Any) -> Any:
    """Turn models inside the changes back into plain values, so that the whole description is validated again."""
    if hasattr(value, "model_dump"):
        return value.model_dump()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _skip_without_programs() -> None:
    for program in ("munged", "mariadbd", "slurmctld", "slurmd", "slurmdbd", "srun", "unshare"):
        try:
            find_program(program)
        except MissingError as error:
            pytest.skip(f"needs the real daemons (make setup installs them): {error}")
