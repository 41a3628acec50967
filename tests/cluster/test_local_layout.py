"""Where a cluster's state is, and how it is guarded."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from cluster.errors import InputError, MissingError, StateError
from cluster.local_layout import (
    Layout,
    LocalState,
    list_layouts,
    locked,
    ports_of_others,
    read_state,
    state_root,
    write_file,
)
from cluster.settings import ClusterSpec, load_spec

DEMO = Path(__file__).parents[2] / "templates" / "cluster" / "local-demo.yaml"


def state_of(name: str, first_port: int, num_nodes: int = 2) -> LocalState:
    return LocalState(
        name=name, phase="up", owner="ada", started_at=1.0,
        controller_port=first_port, database_daemon_port=first_port + 1, first_node_port=first_port + 2, num_nodes=num_nodes,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("euid", "variables", "expected"),
    [
        (0, {}, "/var/lib/muster/local"),
        (0, {"MUSTER_LOCAL_ROOT": "/m"}, "/m"),
        (1000, {"HOME": "/home/ada"}, "/home/ada/.local/state/muster/local"),
        (1000, {"HOME": "/home/ada", "XDG_STATE_HOME": "/x"}, "/x/muster/local"),
        (1000, {"HOME": "/home/ada", "MUSTER_LOCAL_ROOT": "/m"}, "/m"),
        (1000, {"HOME": "/home/ada", "MUSTER_LOCAL_ROOT": ""}, "/home/ada/.local/state/muster/local"),
    ],
)
def test_the_root_by_user_and_variables(
    monkeypatch: pytest.MonkeyPatch, euid: int, variables: dict[str, str], expected: str
) -> None:
    """root's clusters are the machine's, anybody else's are their own, and MUSTER_LOCAL_ROOT beats both."""
    monkeypatch.setattr(os, "geteuid", lambda: euid)
    assert state_root(variables) == Path(expected)


def spec_with(name: str, pool: str) -> ClusterSpec:
    plain = load_spec(DEMO).model_dump()
    plain["name"] = name
    plain["pools"][0]["name"] = pool
    for queue in plain["queues"]:
        queue["pools"] = [pool]
    return ClusterSpec.model_validate(plain)


def test_a_socket_path_that_would_be_too_long_is_refused_up_front() -> None:
    """108 bytes are all that a socket's path may have, Slurm's own step sockets included; the message gives the way out."""
    spec = spec_with("demo", "p" * 30)
    Layout(Path("/var/lib/muster/local/demo")).check(spec_with("demo", "gpu"))
    with pytest.raises(InputError, match=r"_67108863\.4294967295: 1\d\d bytes.*107.*shorter names.*MUSTER_LOCAL_ROOT"):
        Layout(Path("/var/lib/muster/local/demo")).check(spec)
    Layout(Path("/m/demo")).check(spec)


@pytest.mark.parametrize("root", ["/home/ada lovelace", "/tmp/a#b", "/tmp/[x]", "/tmp/ü"])
def test_a_path_that_slurm_cannot_carry_is_refused_up_front(root: str) -> None:
    """Before anything is started, not by a daemon that misreads its configuration."""
    with pytest.raises(InputError, match=r"slurm\.conf only carries"):
        Layout(Path(root) / "demo").check(load_spec(DEMO))


def test_only_clusters_are_listed(tmp_path: Path) -> None:
    """Folders with foreign files, files, and names that no cluster may have are none."""
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "logs").mkdir(parents=True)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").touch()
    (tmp_path / "Upper").mkdir()
    (tmp_path / "file").touch()
    assert [layout.name for layout in list_layouts(tmp_path)] == ["a", "b"]
    assert list_layouts(tmp_path / "nosuch") == []


def test_half_written_state_is_no_state(tmp_path: Path) -> None:
    """A file that an interrupted or other version's command left is as good as none, never an exception."""
    layout = Layout(tmp_path)
    assert read_state(layout) is None
    for text in ("", "{", "[]", '{"name": "x"}', '{"unknown": 1}'):
        layout.state_file.write_text(text)
        assert read_state(layout) is None
    state_of("x", 10_000).write(layout.state_file)
    assert read_state(layout) == state_of("x", 10_000)


def test_other_clusters_ports_are_known(tmp_path: Path) -> None:
    """Ports on record are avoided even while their daemons are down; one's own are not in the way."""
    for name, first in (("a", 10_000), ("b", 10_100)):
        (tmp_path / name).mkdir()
        state_of(name, first).write(tmp_path / name / "state.json")
    assert ports_of_others(Layout(tmp_path / "b")) == {10_000, 10_001, 10_002, 10_003}


def test_a_secret_is_never_open_for_a_moment(tmp_path: Path) -> None:
    """The mode holds whatever the umask is, a file that is there is replaced as a whole, nothing is left beside it."""
    before = os.umask(0)
    try:
        write_file(tmp_path / "f", "one", mode=0o600)
        write_file(tmp_path / "f", "two", mode=0o640)
    finally:
        os.umask(before)
    assert (tmp_path / "f").read_text() == "two"
    assert (tmp_path / "f").stat().st_mode & 0o777 == 0o640
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_a_lock_is_held_until_the_end_and_then_free(tmp_path: Path) -> None:
    """A second command gets an error that says what goes on; afterwards the way is free, and no lock file is left."""
    directory = tmp_path / "demo"
    with (
        locked(directory),
        pytest.raises(StateError, match="demo: another muster command"),
        locked(directory, wait_s=0.1),
    ):
        pass
    with locked(directory, wait_s=0.1):
        pass
    assert list(directory.iterdir()) == []


def test_a_killed_holder_does_not_keep_the_lock(tmp_path: Path) -> None:
    """The lock goes with the process that held it, however that ended."""
    code = "import sys, os; from pathlib import Path; from cluster.local_layout import locked\nwith locked(Path(sys.argv[1])): os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "demo")], timeout=60, check=False, cwd=DEMO.parents[2])
    with locked(tmp_path / "demo", wait_s=0.1):
        pass


def test_a_lock_on_a_directory_that_was_removed_is_not_mistaken_for_one(tmp_path: Path) -> None:
    """Whoever waited while `down` removed the directory makes a new one, and holds that."""
    directory = tmp_path / "demo"
    inside = threading.Event()

    def wait_for_it() -> None:
        with locked(directory, wait_s=10):
            assert directory.is_dir()
            inside.set()

    waiter = threading.Thread(target=wait_for_it)
    with locked(directory):
        waiter.start()
        time.sleep(0.2)
        assert not inside.is_set()
        directory.rmdir()
    waiter.join(timeout=10)
    assert inside.is_set()


def test_a_file_in_the_way_is_said(tmp_path: Path) -> None:
    """A file where the directory should be is an error with the path, not a traceback."""
    (tmp_path / "demo").touch()
    with pytest.raises(StateError, match="in the way"), locked(tmp_path / "demo"):
        pass


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_root_that_may_not_be_written_is_said() -> None:
    """The message names the variable that chooses another place."""
    with pytest.raises(MissingError, match="MUSTER_LOCAL_ROOT"), locked(Path("/proc/muster/demo")):
        pass
