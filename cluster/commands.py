"""`muster cluster`: make and check the description of a cluster."""

from __future__ import annotations

import importlib.resources
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from cluster.checks import check_file
from cluster.errors import FindingsError, InputError, NotFoundError, StateError
from cluster.findings import Finding, Level, worst_level
from cluster.output import console, print_json

cluster_app = typer.Typer(no_args_is_help=True, help="Describe a cluster in one file, and check that file.")

_STYLES = {Level.ERROR: "bold red", Level.WARNING: "yellow", Level.NOTE: "cyan"}


@cluster_app.command("init")
def init(
    template: Annotated[
        str, typer.Option("--template", "-t", help="Which shape to start from; --list shows them.")
    ] = "local-demo",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write; standard output by default.")
    ] = None,
    list_templates: Annotated[bool, typer.Option("--list", help="List the templates and leave.")] = False,
) -> None:
    """Write a commented description to start from."""
    templates = _templates()
    if list_templates:
        for name, text in templates.items():
            console().print(f"{name:<20} {text.splitlines()[0].lstrip('# ')}", highlight=False)
        return
    if template not in templates:
        raise NotFoundError(
            f"template {template!r}: there is none of that name; the templates are: {', '.join(templates)}"
        )
    if output is None:
        typer.echo(templates[template], nl=False)
        return
    _write_new(output, templates[template])
    console().print(f"wrote {output}; next: muster cluster check {output}", highlight=False)


@cluster_app.command("check")
def check(
    file: Annotated[Path, typer.Argument(help="The description to check.", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Report everything that is wrong with a description, without any network.

    Exit code 0 without errors (warnings and notes may stand), 4 with errors, 3 if the file is not YAML at all.
    """
    spec, findings = check_file(file)
    if as_json:
        print_json({"file": str(file), "findings": [finding.as_dict() for finding in findings]})
    else:
        for finding in findings:
            _print(finding)
        counts = [_counted(sum(finding.level is level for finding in findings), level.value) for level in Level]
        nodes = (
            ""
            if spec is None
            else f"{spec.name}: {sum(p.nodes for p in spec.pools)} nodes, queues {', '.join(q.name for q in spec.queues)}; "
        )
        console().print(f"{nodes}{', '.join(counts)}", highlight=False)
    if worst_level(findings) is Level.ERROR:
        raise FindingsError


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _print(finding: Finding) -> None:
    from rich.markup import escape

    where = f"{finding.source}:{finding.line}" if finding.line else finding.source
    value = f" = {finding.value}" if finding.value else ""
    out = console()
    style = _STYLES[finding.level]
    out.print(
        f"[{style}]{finding.level.value}[/] [bold]{escape(finding.field)}{escape(value)}[/] ({escape(where)}, {finding.id})",
        highlight=False,
    )
    out.print(f"    {escape(finding.rule)}", highlight=False)
    out.print(f"    -> {escape(finding.remedy)}", highlight=False)


def _templates() -> dict[str, str]:
    """Return the text of every template by name."""
    folder = importlib.resources.files("templates").joinpath("cluster")
    found = {
        item.name.removesuffix(".yaml"): item.read_text(encoding="utf-8")
        for item in folder.iterdir()
        if item.name.endswith(".yaml")
    }
    return dict(sorted(found.items()))


def _write_new(path: Path, text: str) -> None:
    """Write a file that must not be there yet: beside it first, so that nothing half written is ever left under its name."""
    if path.exists():
        raise StateError(
            f"{path}: exists already and is not overwritten; choose another name with -o, or remove it first"
        )
    beside = None
    try:
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}.", delete=False
        ) as beside:
            beside.write(text)
        Path(beside.name).chmod(0o644)
        Path(beside.name).rename(path)
    except OSError as error:
        if beside is not None:
            Path(beside.name).unlink(missing_ok=True)
        raise InputError(f"{path}: cannot be written: {error.strerror}; choose another place with -o") from error
