"""What every task of a submitted job runs: a callable that holds one path and believes only what it finds there.

submitit pickles it once, at submission, and a requeued job unpickles the same bytes again. So nothing that changes may live in
it: the job stands in `job.yaml` of the run directory, how far it has come in the checkpoints beside it.
"""

from __future__ import annotations

import importlib
import logging
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.errors import InterruptedRunError, JobError, MissingError, MusterError, OutsideError
from jobs.interruption import StopSignals
from jobs.jobspec import JobSpec
from jobs.journal import Ending, EndReason, RunDirectory
from jobs.process_group import RankInfo, read_rank_info
from jobs.requeue import REQUEUE_EXIT_CODE, Requeuer, quit_now

if TYPE_CHECKING:
    from jobs.settings import TrainConfig

logger = logging.getLogger(__name__)

_DONE_POLL_S = 0.5
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
            0, for submitit to note; every other ending leaves the process at once (`quit_now`), so that the exit code of the
            task is the program's own, and a job that is back in the queue has its nodes soon.
        """
        from jobs.run_folder import read_run

        _set_up_plain_logging()
        if self.index is not None:
            os.environ["MUSTER_ARRAY_INDEX"] = str(self.index)
            os.environ["MUSTER_RUN_DIRECTORY"] = self.directory
        directory = Path(self.directory)
        try:
            spec = read_run(directory)
            if spec.kind == "training":
                from jobs.train import main

                code = main(training_config(spec, directory))
            else:
                code = run_attempt(spec, directory)
        except MusterError as error:
            logger.error("%s", error)
            code = error.exit_code
        if code:
            quit_now(code)
        return 0

    @staticmethod
    def check(spec: JobSpec, directory: Path) -> None:
        """Check what the entry point will be called with, as far as that is possible before it runs.

        Raises:
            JobError: It would be refused there; the message lists every mistake.
        """
        if spec.kind == "training":
            training_config(spec, directory).micro_batch_size(spec.nodes * spec.tasks)
        elif spec.entry == "jobs.preprocess":
            from cluster.yamlfile import YamlDocument, validate
            from jobs.preprocess_settings import PreprocessConfig

            validate(PreprocessConfig, YamlDocument(spec.config, {}, "config"), error_type=JobError)


class ProgramEnded(OutsideError):
    """The job's command, or its entry point, ended with an exit code of its own, which the task hands on."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.exit_code = code  # type: ignore[misc] # a class's constant elsewhere in the tree; here the program decides


def run_attempt(spec: JobSpec, directory: Path) -> int:
    """Run a command or an entry point with a journal and a way back into the queue; returns the exit code to leave with.

    A program that ends because the job is preempted comes back, and so does one that asks for it with exit code 75. One that
    fails comes back `retries` times. One that runs into its time limit without asking for more is left there: it would only run
    into it again. One that ends with 0 is done, also where it was told to stop.
    """
    with StopSignals() as stop:
        info = read_rank_info(os.environ)
        run = RunDirectory(directory)
        requeuer = Requeuer(info, run, stop=stop, retries=spec.allowed_retries)
        try:
            run.begin_attempt(
                info, 0, retries=spec.allowed_retries, is_job_alive=requeuer.is_job_alive, explain=requeuer.explain
            )
            code = run_command(spec) if spec.kind == "command" else call_entry_point(spec)
            if code == 0:
                if not _all_are_done(run, info, stop):
                    return requeuer.leave_early()
                run.end_attempt(EndReason.FINISHED, None, message=_doubt(stop))
                return 0
            if code != REQUEUE_EXIT_CODE and stop.requested is None:
                raise ProgramEnded(f"{_program(spec)} ended with exit code {code}", code)
            code = _leave(requeuer, run, info, code)
        except InterruptedRunError as error:
            logger.info("%s", error)
            code = requeuer.leave_early()
        except Exception as error:  # of whatever kind: the journal and the other ranks must hear of it
            logger.error("%s", error, exc_info=not isinstance(error, MusterError))
            code = requeuer.leave_after_crash(error)
    return code


def _all_are_done(run: RunDirectory, info: RankInfo, stop: StopSignals) -> bool:
    """Leave word that this rank is done and, on rank 0, wait for the others: the attempt is finished when all of them are.

    Returns:
        False on rank 0 if the job has to leave before that: another rank has failed, or a stop was asked for.
    """
    if info.world_size == 1:
        return True
    run.note_done(info)
    while info.is_first and run.ranks_done(info) < info.world_size:
        if stop.requested is not None or run.is_ending_claimed(info):
            return False
        time.sleep(_DONE_POLL_S)
    return True


def _doubt(stop: StopSignals) -> str:
    """Say, in the log too, what speaks against believing a program that ended with 0; nothing where nothing does."""
    if stop.requested is None:
        return ""
    message = (
        f"ended with exit code 0 after {stop.requested}, which counts as done; a program that has more to do exits with "
        f"{REQUEUE_EXIT_CODE}"
    )
    logger.warning("%s", message)
    return message


def _leave(requeuer: Requeuer, run: RunDirectory, info: RankInfo, code: int) -> int:
    """Settle an attempt whose program ended because it was told to; returns the exit code."""
    if code == REQUEUE_EXIT_CODE:
        return requeuer.leave_early()
    cause = requeuer.find_cause()
    if cause.reason is not EndReason.TIME_LIMIT:
        return requeuer.leave_early()
    message = "at its time limit, without asking (exit code 75) to go on"
    logger.info("ended %s", message)
    if run.claim_ending(info):
        run.write_ending(info, Ending(code, cause.reason, message))
    run.end_attempt(cause.reason, None, message=message)
    return code


def run_command(spec: JobSpec) -> int:
    """Run the job's command and return its exit code, or for one ended by signal n what a shell makes of it, 128 + n.

    Slurm signals every process of a task. So the signals reach the command without help, and this process (`StopSignals`) only
    takes note of them.
    """
    argv = [*spec.command, *spec.arguments]
    logger.info("running %s", shlex.join(argv))
    try:
        # Handlers set in Python do not survive into the new program: it starts with the signals' own defaults.
        returncode = subprocess.run(argv, env=command_environment(os.environ), check=False).returncode
    except FileNotFoundError as error:
        node = os.uname().nodename
        raise MissingError(
            f"{argv[0]}: not found on node {node}; is it on a file system that every node has?"
        ) from error
    except OSError as error:
        raise MissingError(
            f"{argv[0]}: cannot be run: {error.strerror}; check its mode, and the first line of a script"
        ) from error
    return returncode if returncode >= 0 else _KILLED_BASE - returncode


def command_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment as the user meant it: without what keeps a user's own packages away from Muster's."""
    result = dict(environment)
    python_path = result.pop("MUSTER_PYTHONPATH", "")
    result.pop("PYTHONSAFEPATH", None)
    result.pop("PYTHONPATH", None)
    if python_path:
        result["PYTHONPATH"] = python_path
    return result


def call_entry_point(spec: JobSpec) -> int:
    """Import the entry point and call it with the mapping `config`; returns its exit code, 0 if it returns nothing."""
    assert spec.entry is not None
    _add_user_path()
    module_name, _, function_name = spec.entry.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise MissingError(
            f"entry: {module_name} cannot be imported ({error}); is its directory in PYTHONPATH?"
        ) from error
    function = getattr(module, function_name or "main", None)
    if not callable(function):
        raise JobError(f"entry: {module_name} has no function {function_name or 'main'}; write module:function")
    code = function(dict(spec.config))
    return code if isinstance(code, int) else 0


def training_config(spec: JobSpec, directory: Path) -> TrainConfig:
    """Return the TrainConfig of a training job, with the run directory that the job has.

    Raises:
        JobError: A value is wrong; the message lists every mistake.
    """
    from cluster.yamlfile import YamlDocument, validate
    from jobs.settings import TrainConfig

    values = {**spec.config, "run_directory": str(directory)}
    if spec.retries is not None:
        values["retries"] = spec.retries
    return validate(TrainConfig, YamlDocument(values, {}, "config"), error_type=JobError)


def _program(spec: JobSpec) -> str:
    return spec.entry if spec.entry is not None else spec.command[0]


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
