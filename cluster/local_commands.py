"""`muster local`: a real Slurm cluster on this machine."""

from __future__ import annotations

import shlex
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from cluster.errors import NotFoundError, StateError
from cluster.local import LocalCluster, LocalStatus, find_cluster, list_clusters
from cluster.local_start import Step
from cluster.output import as_plain, console, error_console, print_json, print_table
from cluster.settings import ClusterSpec

local_app = typer.Typer(no_args_is_help=True, help="A real Slurm cluster with simulated GPUs on this machine.")

NameOption = Annotated[
    str | None,
    typer.Option("--name", help="Which cluster; may be left out where MUSTER_CLUSTER is set or there is one only."),
]


@local_app.command("up")
def up(
    nodes: Annotated[int | None, typer.Option(min=1, max=10_000, help="Nodes of the first pool.")] = None,
    gpus: Annotated[int | None, typer.Option(min=0, max=16, help="GPUs of each node of the first pool.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the cluster; the description's own by default.")] = None,
    spec_file: Annotated[
        Path | None,
        typer.Option("--spec", help="Description of the cluster; templates/cluster/local-demo.yaml by default."),
    ] = None,
) -> None:
    """Start a cluster: munged, MariaDB, slurmdbd, slurmctld, and one slurmd a node, on loopback only."""
    spec = _read_spec(spec_file)
    changes = {key: value for key, value in (("nodes", nodes), ("gpus_per_node", gpus)) if value is not None}
    pools = (spec.pools[0].model_copy(update=changes), *spec.pools[1:])
    cluster = LocalCluster(name or spec.name)
    started = time.monotonic()
    with _Progress() as progress:
        cluster.up(spec.model_copy(update={"pools": pools}), progress)
    _print_status(cluster.status())
    console().print(
        f"\ncluster {cluster.name} is up after {time.monotonic() - started:.1f} s; to use it:", highlight=False
    )
    option = f" --name {cluster.name}" if len(list_clusters()) > 1 else ""
    console().print(f'  eval "$(muster local env{option})"', highlight=False, markup=False)


@local_app.command("status")
def status(
    name: NameOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON: a list of clusters.")] = False,
) -> None:
    """Show what runs: every cluster here, or the one named."""
    clusters = [find_cluster(name)] if name is not None else list_clusters()
    found = [cluster.status() for cluster in clusters]
    if as_json:
        print_json([as_plain(one) for one in found])
        return
    if not found:
        raise NotFoundError("no cluster on this machine; muster local up starts one")
    for number, one in enumerate(found):
        if number:
            console().print()
        _print_status(one)


@local_app.command("down")
def down(
    name: NameOption = None,
    every: Annotated[bool, typer.Option("--all", help="End every cluster of this user.")] = False,
    keep_logs: Annotated[bool, typer.Option("--keep-logs", help="Leave the directory of logs.")] = False,
) -> None:
    """End a cluster with everything that runs on it, and remove its files."""
    if every and name is not None:
        raise typer.BadParameter("--all and --name contradict each other")
    clusters = [c for c in list_clusters() if c.is_mine()] if every else [find_cluster(name)]
    if not clusters:
        console().print("no cluster of yours on this machine, so there is none to end", highlight=False)
    for cluster in clusters:
        cluster.down(keep_logs=keep_logs)
        left = f"its logs are in {cluster.layout.logs}" if keep_logs else "nothing is left of it"
        console().print(f"cluster {cluster.name} is down; {left}", highlight=False)


@local_app.command("env")
def env(name: NameOption = None) -> None:
    """Print the variables that point Slurm's and Muster's commands at a cluster, for eval in a shell."""
    for key, value in find_cluster(name).environment().items():
        typer.echo(f"export {key}={shlex.quote(value)}")


@local_app.command("logs")
def logs(
    what: Annotated[
        str | None,
        typer.Argument(
            help="A daemon (slurmctld, slurmdbd, mariadbd, munged) or a node; all that there are are listed without."
        ),
    ] = None,
    name: NameOption = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on printing what is added, until Ctrl-C.")] = False,
    num_lines: Annotated[int, typer.Option("--lines", "-n", min=0, help="How many of the last lines.")] = 50,
) -> None:
    """Print the end of a daemon's or a node's log."""
    cluster = find_cluster(name)
    there = {path.stem: path for path in sorted(cluster.layout.logs.glob("*.log"))}
    if what is None:
        print_table(["log", "bytes", "path"], [(stem, path.stat().st_size, path) for stem, path in there.items()])
        return
    path = there.get(what) or there.get(f"slurmd-{what}")
    if path is None:
        raise NotFoundError(f"{what}: cluster {cluster.name} has no such log; it has: {', '.join(there) or 'none'}")
    for line in _lines(path, num_lines, follow=follow):
        typer.echo(line, nl=False)


class _Progress:
    """Says each finished step in a line, and, where somebody watches, how far the nodes are."""

    def __init__(self) -> None:
        self._console = error_console()
        self._status = self._console.status("starting")
        self._lock = threading.Lock()  # steps are reported from several threads

    def __enter__(self) -> _Progress:
        if self._console.is_terminal:
            self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._status.stop()

    def __call__(self, step: Step) -> None:
        with self._lock:
            count = f" {step.done}/{step.total}" if step.total > 1 else ""
            if step.done < step.total:
                self._status.update(f"{step.name}{count}")
                return
            self._status.update("starting")
            self._console.print(f"{step.name + count:<16}{step.seconds:6.2f} s", highlight=False)


def _read_spec(path: Path | None) -> ClusterSpec:
    import importlib.resources

    from cluster.yamlfile import parse_yaml, read_yaml, validate

    if path is not None:
        spec = validate(ClusterSpec, read_yaml(path))
    else:
        text = importlib.resources.files("templates").joinpath("cluster/local-demo.yaml").read_text(encoding="utf-8")
        spec = validate(ClusterSpec, parse_yaml(text, source="templates/cluster/local-demo.yaml"))
    if spec.target != "local":
        raise StateError(f"{path}: target is {spec.target}; muster local up starts clusters with `target: local` only")
    return spec


def _print_status(status: LocalStatus) -> None:
    style = {"up": "bold green", "stopped": "dim"}.get(status.state, "bold yellow")
    console().print(
        f"cluster [bold]{status.name}[/]  [{style}]{status.state}[/]  {status.owner}  {status.directory}",
        highlight=False,
    )
    if not status.daemons:
        return
    rows: list[tuple[object, ...]] = [
        (daemon.name, daemon.pid or "gone", daemon.port or "", "") for daemon in status.daemons
    ]
    rows += [
        (node.name, node.slurmd_pid or ("no slurmd" if node.powered else "off"), node.port, node.slurm_state)
        for node in status.nodes
    ]
    print_table(["daemon", "pid", "port", "state"], rows)


def _lines(path: Path, num_lines: int, *, follow: bool) -> Iterator[str]:
    with path.open(encoding="utf-8", errors="replace") as file:
        yield from deque(file, maxlen=num_lines)
        while follow:
            line = file.readline()
            if line:
                yield line
            elif not path.exists():
                return  # the cluster went down
            else:
                time.sleep(0.2)
