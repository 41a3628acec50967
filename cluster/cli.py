"""The front door `muster`: registers each package's verbs and does nothing else.

Only the module of the verb in use is imported, so `muster --help` costs no torch, boto3 or diffusers, and `cluster` need not
import `jobs` or `monitoring`, which stand above it.
"""

from __future__ import annotations

import errno
import importlib
import importlib.metadata
import itertools
import logging
import os
import signal
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import typer

from cluster.errors import MissingError, MusterError, OutsideError
from cluster.output import error_console, set_up_logging

_NOT_OUR_FAULT = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}


@dataclass(frozen=True)
class Verb:
    """A command, or a group of commands, and where it lives."""

    module: str
    attribute: str
    """A `typer.Typer` (a group) or a function (a single command) in `module`."""
    help: str
    context: Mapping[str, Any] = field(default_factory=dict)
    """Context settings of a single command, for verbs that pass unknown options on."""


VERBS: dict[str, Verb] = {
    "cluster": Verb("cluster.commands", "cluster_app", "Describe a cluster in one file, and check that file."),
    "local": Verb("cluster.local_commands", "local_app", "A real Slurm cluster with simulated GPUs on this machine."),
    "submit": Verb("jobs.commands", "submit", "Submit a job description to a queue."),
    "sbatch": Verb(
        "jobs.commands",
        "sbatch",
        "sbatch as ever; requeue, append-mode logs, queue and account are filled in where you gave none.",
        {
            "ignore_unknown_options": True,
            "allow_extra_args": True,
            "allow_interspersed_args": False,  # a `--` behind the script is the script's own
            "help_option_names": ["--muster-help"],
        },
    ),
    "jobs": Verb("jobs.commands", "jobs_app", "List, show, follow, explain and cancel jobs."),
    "demo": Verb("jobs.demo", "demo", "The main job from end to end on this machine (make demo)."),
}
"""Every verb, in the order that `muster --help` shows."""


def build_app(chosen: str | None) -> typer.Typer:
    """Make the command line with the verb `chosen` in full and every other one as a line of help."""
    app = typer.Typer(
        name="muster",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    for name, verb in VERBS.items():
        if name != chosen:
            app.command(name, help=verb.help)(_not_loaded)
            continue
        target = getattr(_import(name, verb), verb.attribute)
        if isinstance(target, typer.Typer):
            app.add_typer(target, name=name, help=verb.help)
        else:
            app.command(name, context_settings=dict(verb.context))(target)
    return app


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line and end the process with the exit code that `cluster.errors` documents."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    set_up_logging(_verbosity(arguments))
    _stand_first_on_the_path()
    signal.signal(signal.SIGTERM, _end_as_if_interrupted)
    try:
        build_app(_chosen_verb(arguments, os.environ))(arguments, prog_name="muster")
    except MusterError as error:
        if str(error):
            error_console().print(f"[bold red]error:[/] {_escape(str(error))}", soft_wrap=True, highlight=False)
        logging.getLogger(__name__).info("the error's origin", exc_info=error)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        error_console().print("interrupted")
        sys.exit(130)
    except BrokenPipeError:
        # The reader of our output left (muster jobs list | head): not an error, and nothing more can be printed.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        if error.errno not in _NOT_OUR_FAULT:
            _report_unexpected(error)
            sys.exit(1)
        what = f"{error.filename}: " if error.filename else ""
        error_console().print(
            f"[bold red]error:[/] {_escape(what)}{error.strerror}; make room or choose another place", soft_wrap=True
        )
        sys.exit(OutsideError.exit_code)
    except Exception as error:  # the last resort of the whole program: say it plainly, keep the traceback for -v
        _report_unexpected(error)
        sys.exit(1)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"muster {importlib.metadata.version('muster-hpc')}")
        raise typer.Exit


def _root(
    verbose: int = typer.Option(
        0, "-v", "--verbose", count=True, help="Say more; twice for every command that is run."
    ),
    version: bool = typer.Option(  # noqa: ARG001 - its callback has done all there is to do
        False, "--version", is_eager=True, callback=_print_version, help="Print the version and leave."
    ),
) -> None:
    """Run a Slurm GPU training cluster: describe it, check it, submit to it, watch it.

    [bold]muster local up[/] gives you one on this machine.
    """
    set_up_logging(verbose)


def _verbosity(arguments: Sequence[str]) -> int:
    """Count the -v before the verb: they must hold while the verb's module is imported, which comes before parsing."""
    leading = itertools.takewhile(lambda word: word.startswith("-"), arguments)
    return sum(1 if word == "--verbose" else word.count("v") * (not word.startswith("--")) for word in leading)


def _stand_first_on_the_path() -> None:
    """Put Muster's own packages before a `jobs` folder of the user's that PYTHONPATH brings in."""
    root = str(Path(__file__).resolve().parent.parent)
    if sys.path[:1] != [root]:
        sys.path.insert(0, root)


def _end_as_if_interrupted(_number: int, _frame: object) -> None:
    """Turn SIGTERM into KeyboardInterrupt, so that whatever was started (a cluster, a temporary file) is tidied up."""
    raise KeyboardInterrupt


def _not_loaded() -> None:
    """Stand in for a verb that was not asked for: `build_app` replaces it by the real one before it can run."""
    raise AssertionError("a verb ran that build_app had not loaded")


def _chosen_verb(arguments: Sequence[str], environment: Mapping[str, str]) -> str | None:
    """Return the first word that is not an option; under shell completion, that of the line being completed."""
    words: Sequence[str] = arguments
    if "_MUSTER_COMPLETE" in environment:
        line = environment.get("COMP_WORDS", environment.get("_TYPER_COMPLETE_ARGS", ""))
        words = line.split()[1:]
    return next((word for word in words if not word.startswith("-")), None)


def _import(name: str, verb: Verb) -> Any:
    try:
        return importlib.import_module(verb.module)
    except ModuleNotFoundError as error:
        ours = {"cluster", "jobs", "monitoring", "hooks", "templates"}
        if error.name is None or error.name.partition(".")[0] in ours:
            raise
        raise MissingError(
            f"muster {name} needs the Python package {error.name!r}, which is not installed here; "
            f"pip install 'muster-hpc[train]' brings it"
        ) from error


def _report_unexpected(error: Exception) -> None:
    console = error_console()
    console.print(
        f"[bold red]unexpected error:[/] {type(error).__name__}: {_escape(str(error))}",
        soft_wrap=True,
        highlight=False,
    )
    if logging.getLogger().isEnabledFor(logging.INFO):
        traceback.print_exception(error)
    else:
        console.print(
            "This is a fault in Muster. Run it again with [bold]muster -v ...[/] for the traceback, and report that."
        )


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)
