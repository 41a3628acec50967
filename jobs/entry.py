"""What every task of a submitted job runs: a callable that holds one path and believes only what it finds there.

submitit pickles it once, at submission, and a requeued job unpickles the same bytes again. So nothing that changes may live in
it: the job stands in `job.yaml` of the run directory, how far it has come in the checkpoints beside it.
"""

from __future__ import annotations

import importlib
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.errors import InterruptedRunError, JobError, MusterError
from jobs.jobspec import JobSpec

logger = logging.getLogger(__name__)

_SHELL_CANNOT_RUN = (
    126  # what a shell answers for a program that is there and cannot be run, and the next for one that is not
)
_SHELL_CANNOT_FIND = 127
_KILLED_BASE = 128  # a shell's exit status for a program ended by signal n is 128 + n


class Task:
    """One task of a job. Ends the process with the exit code that Slurm should see.

    Args:
        directory: Run directory of the job, or of this element of an array.
        index: Number of the element; None outside arrays.
    """

    def __init__(self, directory: str, *, index: int | None = None) -> None:
        self.directory = directory
        self.index = index

    def __call__(self) -> int:
        """Run the task to its end.

        Returns:
            0; every other ending leaves by SystemExit, so that the exit code of the task is the program's own.
        """
        from jobs.run_folder import read_run

        _set_up_plain_logging()
        if self.index is not None:
            os.environ["MUSTER_ARRAY_INDEX"] = str(self.index)
            os.environ["MUSTER_RUN_DIRECTORY"] = self.directory
        try:
            spec = read_run(Path(self.directory))
            if spec.kind == "command":
                run_command(spec)
            else:
                _add_user_path()
                run_entry_point(spec, Path(self.directory))
        except InterruptedRunError as stop:
            logger.info("%s", stop)
            sys.exit(stop.exit_code)
        except MusterError as error:
            logger.error("%s", error)
            sys.exit(error.exit_code)
        return 0

    @staticmethod
    def check(spec: JobSpec, directory: Path) -> None:
        """Check what the entry point will be called with, as far as that is possible before it runs.

        Raises:
            JobError: It would be refused there; the message lists every mistake.
        """
        if spec.kind == "training":
            _check_training(spec, directory)


def run_command(spec: JobSpec) -> None:
    """Run the job's command and leave with its exit code, unless that is 0.

    Slurm signals every process of a task. So the signals reach the command without help, and this process only has to
    outlive them.
    """
    for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGCONT):
        signal.signal(number, _outlive)
    argv = [*spec.command, *spec.arguments]
    logger.info("running %s", " ".join(argv))
    try:
        # Handlers set in Python do not survive into the new program: it starts with the signals' own defaults.
        returncode = subprocess.run(argv, env=command_environment(os.environ), check=False).returncode
    except FileNotFoundError:
        logger.error(
            "%s: not found on node %s; is it on a file system that every node has?", argv[0], os.uname().nodename
        )
        sys.exit(_SHELL_CANNOT_FIND)
    except OSError as error:
        logger.error("%s: cannot be run: %s", argv[0], error.strerror)
        sys.exit(_SHELL_CANNOT_RUN)
    if returncode:
        code = returncode if returncode > 0 else _KILLED_BASE - returncode
        logger.info("%s ended with exit code %d", argv[0], code)
        sys.exit(code)


def command_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment as the user meant it: without what keeps a user's own packages away from Muster's."""
    result = dict(environment)
    python_path = result.pop("MUSTER_PYTHONPATH", "")
    result.pop("PYTHONSAFEPATH", None)
    result.pop("PYTHONPATH", None)
    if python_path:
        result["PYTHONPATH"] = python_path
    return result


def run_entry_point(spec: JobSpec, directory: Path) -> None:
    """Import the entry point and call it: the trainer with its checked configuration, others with the mapping `config`."""
    assert spec.entry is not None
    if spec.kind == "training":
        from jobs.train import train

        train(training_config(spec, directory))
        return
    module_name, _, function_name = spec.entry.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise JobError(f"entry: {module_name} cannot be imported ({error}); is its directory in PYTHONPATH?") from error
    function = getattr(module, function_name or "main", None)
    if not callable(function):
        raise JobError(f"entry: {module_name} has no function {function_name or 'main'}; write module:function")
    code = function(dict(spec.config))
    if isinstance(code, int) and code:
        sys.exit(code)


def training_config(spec: JobSpec, directory: Path) -> Any:
    """Return the TrainConfig of a training job, with the run directory that the job has.

    Raises:
        JobError: A value is wrong; the message lists every mistake.
    """
    from cluster.yamlfile import YamlDocument, validate
    from jobs.settings import TrainConfig

    values = {**spec.config, "run_directory": str(directory)}
    return validate(TrainConfig, YamlDocument(values, {}, "config"), error_type=JobError)


def _check_training(spec: JobSpec, directory: Path) -> None:
    config = training_config(spec, directory)
    config.micro_batch_size(spec.nodes * spec.tasks)


def _set_up_plain_logging() -> None:
    """Write log records as plain lines, which is what a log file is for, and keep submitit's own from standing there twice."""
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stdout, force=True
    )
    logging.getLogger("submitit").propagate = False


def _add_user_path() -> None:
    """Let entry points be imported from the user's PYTHONPATH, and from there only after everything of ours."""
    for entry in os.environ.get("MUSTER_PYTHONPATH", "").split(os.pathsep):
        if entry and entry not in sys.path:
            sys.path.append(entry)


def _outlive(number: int, frame: object) -> None:
    """Do nothing. Unlike SIG_IGN, a handler is not inherited by the command, which must hear the signal."""
