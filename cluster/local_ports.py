"""Ports for the daemons of a cluster on this machine: a free block, held until each daemon has bound its own."""

from __future__ import annotations

import contextlib
import random
import socket
from collections.abc import Collection, Iterator
from pathlib import Path

from cluster.errors import StateError

LOOPBACK = "127.0.0.1"
_LOWEST = 10_000
_TRIES = 200


@contextlib.contextmanager
def held_ports(count: int, *, avoid: Collection[int] = (), highest: int | None = None) -> Iterator[int]:
    """Hold `count` consecutive free loopback ports and yield the first one.

    Held ports are bound but not listened on, with SO_REUSEADDR set after the fact: a daemon that sets it too, as
    Slurm's do, can bind and listen while we hold, and any other search for free ports finds them taken. So nothing
    slips in between finding and using. The block lies below the kernel's ephemeral ports, or an outgoing connection
    could take the port of a daemon that is down.

    Args:
        count: How many ports.
        avoid: Ports that other clusters have, whose daemons may be down for the moment.
        highest: Last port that may be used; by default the last one below the ephemeral range.

    Raises:
        StateError: There is no free block.
    """
    last = (_first_ephemeral_port() - 1) if highest is None else highest
    spread = last - _LOWEST - count + 1
    taken = set(avoid)
    for _ in range(_TRIES if spread >= 0 else 0):
        first = _LOWEST + random.randint(0, spread)
        if taken.isdisjoint(range(first, first + count)):
            with contextlib.ExitStack() as stack:
                if all(_hold(port, stack) for port in range(first, first + count)):
                    yield first
                    return
    raise StateError(
        f"no {count} free ports in a row between {_LOWEST} and {last} on {LOOPBACK}; stop what uses them (ss -ltn shows it)"
    )


def _hold(port: int, stack: contextlib.ExitStack) -> bool:
    holder = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
    try:
        holder.bind((LOOPBACK, port))
    except OSError:
        return False
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    return True


def _first_ephemeral_port() -> int:
    try:
        return int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="ascii").split()[0])
    except (OSError, ValueError, IndexError):
        return 32_768  # the kernel's default, ip-sysctl.rst
