"""Free ports: found, held against others, usable by the daemon they are held for."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from cluster.errors import StateError
from cluster.local_ports import LOOPBACK, held_ports


def listener(port: int) -> socket.socket:
    """Listen as Slurm's daemons do: with SO_REUSEADDR."""
    server = socket.socket()
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    server.bind((LOOPBACK, port))
    server.listen()
    return server


def test_a_held_port_can_be_used_by_its_daemon_and_looks_taken_to_others() -> None:
    """While we hold a block, a daemon can listen in it, and another search does not get it."""
    with held_ports(3) as first:
        with listener(first + 1):
            client = socket.create_connection((LOOPBACK, first + 1), timeout=5)
            client.close()
        with pytest.raises(StateError, match="free ports"), held_ports(3, highest=10_000 + 2, avoid=range(first)):
            pass
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind((LOOPBACK, first))


def test_a_held_block_is_not_given_twice() -> None:
    """Two searches in a range that has room for both never overlap."""
    with held_ports(4, highest=10_040) as first, held_ports(4, highest=10_040) as second:
        assert set(range(first, first + 4)).isdisjoint(range(second, second + 4))


def test_ports_in_use_and_ports_to_avoid_are_passed_over() -> None:
    """The block lies clear of a foreign listener and of the ports that other clusters have on record."""
    with held_ports(1) as port:
        pass
    with listener(port):
        for _ in range(20):
            with held_ports(2, highest=max(10_020, port + 20), avoid=[port + 1]) as first:
                assert not {port, port + 1} & {first, first + 1}


def test_blocks_lie_below_the_ephemeral_ports() -> None:
    """An outgoing connection can never take the port of a daemon that is down for the moment."""
    ephemeral = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    for _ in range(20):
        with held_ports(66) as first:
            assert first >= 10_000
            assert first + 65 < ephemeral


def test_no_room_is_an_error_that_gives_the_range() -> None:
    """More ports than there are: value, rule, next step."""
    with pytest.raises(StateError, match=r"no 30000 free ports.*10000.*ss -ltn"), held_ports(30_000):
        pass
    with pytest.raises(StateError, match="no 2 free"), held_ports(2, highest=10_001, avoid=[10_000]):
        pass
