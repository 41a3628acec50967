"""`Launcher`: hands a JobSpec to Slurm. The only user of submitit.

submitit writes the batch script, pickles a callable and starts it on every task. The callable (`jobs.entry.Task`) holds one
path: what a run is, and how far it has come, stands in the run directory, so a requeued, preempted or moved job needs nothing
from the pickle. submitit's own submission step is replaced for three reasons: it asks sbatch without a deadline, leaves files
behind when sbatch refuses, and forgets its own class (and with it all of this) when it submits an array.
"""

from __future__ import annotations

import getpass
import logging
import os
import shlex
import sys
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import DelayedSubmission

import jobs
from cluster.durations import slurm_time
from cluster.errors import JobError, MissingError
from cluster.findings import Level
from cluster.settings import ClusterSpec
from cluster.shell import LocalShell, Shell
from cluster.slurm import SlurmClient
from jobs.entry import Task
from jobs.jobspec import JobSpec
from jobs.queues import Placement, check_job, place
from jobs.run_folder import RunFolder
from jobs.sbatch import read_script

logger = logging.getLogger(__name__)

_UNLIMITED_MIN = 366 * 24 * 60  # what submitit is told where there is no limit; it only writes it into a log line
_PROBE_TIMEOUT_S = 20.0


class Launcher:
    """Submits jobs to one cluster.

    Args:
        cluster: What the cluster is; None where that is not known: then Slurm's own defaults hold, and nothing can be checked
            before Slurm is asked.
        slurm: How to talk to Slurm.
        runs: Directory that holds the run directories; `default_runs(cluster)` unless given.
        avoided_nodes: Nodes to stay away from.
        user: Login name; the current user's unless given.
        environment: The environment that jobs will inherit; this process's own unless given.
        shell: Runs the one command that is not Slurm's business with jobs (does srun know containers?).
    """

    def __init__(
        self,
        cluster: ClusterSpec | None,
        slurm: SlurmClient,
        *,
        runs: Path | None = None,
        avoided_nodes: Sequence[str] = (),
        user: str | None = None,
        environment: Mapping[str, str] | None = None,
        shell: Shell | None = None,
    ) -> None:
        self._cluster = cluster
        self._slurm = slurm
        self._runs = default_runs(cluster) if runs is None else runs
        self._avoided = tuple(avoided_nodes)
        self._user = getpass.getuser() if user is None else user
        self._environment = os.environ if environment is None else environment
        self._shell = LocalShell() if shell is None else shell

    def run_directory(self, spec: JobSpec) -> Path:
        """Return where the run is kept, as an absolute path."""
        chosen = spec.run_directory or spec.config.get("run_directory") or self._runs / spec.name
        return Path(os.path.abspath(Path(chosen).expanduser()))  # noqa: PTH100 - resolve() would follow /fsx -> /lustre/...

    def check(self, spec: JobSpec) -> None:
        """Refuse a job that cannot run here; log what somebody will regret.

        Raises:
            JobError: It cannot; the message lists every reason.
            MissingError: It wants a container, and srun knows none.
        """
        directory = self.run_directory(spec)
        findings = []
        if self._cluster is not None:
            findings = check_job(spec, self._cluster, user=self._user, avoided_nodes=self._avoided)
        errors = [str(finding) for finding in findings if finding.level is Level.ERROR]
        if "%" in str(directory) or any(ord(character) < 32 for character in str(directory)):
            errors.append(
                f"run_directory ({str(directory)!r}): % and control characters mean something to sbatch; choose another"
            )
        elements = [spec] if spec.array is None else [spec.task(index) for index in range(spec.array.count)]
        for index, element in enumerate(elements):
            try:
                Task.check(element, directory if spec.array is None else directory / str(index))
            except JobError as error:
                errors.append(str(error))
                break  # the elements are alike: one set of messages is enough
        if errors:
            raise JobError(
                "\n".join([f"{spec.name}: {len(errors)} mistake{'s' * (len(errors) > 1)}", *(f"  {e}" for e in errors)])
            )
        for finding in findings:
            logger.warning("%s: %s", spec.name, finding)
        if spec.container is not None:
            self._check_containers()

    def script(self, spec: JobSpec) -> str:
        """Return the exact batch script that `submit` would write. Writes nothing and asks Slurm nothing.

        Raises:
            JobError: The job cannot run here.
        """
        self.check(spec)
        return self._executor(spec).script_text(None if spec.array is None else spec.array.count)

    def submit(self, spec: JobSpec) -> submitit.Job[Any]:
        """Submit a job.

        Raises:
            JobError: It cannot run here, or its run directory holds a run with other settings.
            StateError: Its run directory holds a finished training, or a run in use by a live job. Commands and other entry
                points keep no mark of being finished: they run again.
            SlurmError: Slurm refused. The run directory is then as it was before.
        """
        if spec.array is not None:
            raise JobError(f"{spec.name}: array ({spec.array.count}) makes several jobs; call submit_array for it")
        return self._submit(spec)[0]

    def submit_array(self, spec: JobSpec) -> list[submitit.Job[Any]]:
        """Submit a job array; element i keeps its run in `i` under the run directory. Errors as for `submit`."""
        if spec.array is None:
            raise JobError(f"{spec.name}: has no array; call submit for it")
        return self._submit(spec)

    def _submit(self, spec: JobSpec) -> list[submitit.Job[Any]]:
        self.check(spec)
        directory = self.run_directory(spec)
        elements = {directory: spec}
        if spec.array is not None:
            elements = {directory / str(index): spec.task(index) for index in range(spec.array.count)}
        folder = RunFolder(directory)
        with folder.claimed(self._slurm, spec):
            for path, element in elements.items():
                folder.write_job(path, element)
            tasks = [Task(str(path), index=None if spec.array is None else i) for i, path in enumerate(elements)]
            submitted = self._executor(spec).submit_tasks(tasks, is_array=spec.array is not None)
        logger.info("submitted %s as %s; it is kept in %s", spec.name, submitted[0].job_id, directory)
        return submitted

    def _executor(self, spec: JobSpec) -> _Executor:
        placement = place(spec, self._cluster, user=self._user, avoided_nodes=self._avoided)
        directory = self.run_directory(spec)
        python = shlex.quote(sys.executable) if spec.container is None else shlex.quote(spec.container.python)
        if sys.version_info < (3, 11):
            python += " -I"  # PYTHONSAFEPATH is new in 3.11; isolated mode keeps the working directory out as well
        executor = _Executor(directory / "slurm", slurm=self._slurm, python=python, environment=self._environment)
        executor.limit_min = _minutes(placement)
        executor.max_num_timeout = spec.allowed_retries
        executor.update_parameters(**self._parameters(spec, placement, directory))
        return executor

    def _parameters(self, spec: JobSpec, placement: Placement, directory: Path) -> dict[str, Any]:
        """Return what submitit's executor takes. It leaves out whatever is None."""
        additional: dict[str, Any] = {
            "requeue": True,
            **{key: value for key, value in spec.slurm.items() if value is not False},
        }
        if placement.time_limit is not None:
            additional["time"] = slurm_time(placement.time_limit)  # submitit's own takes whole minutes only
        # submitit always asks for a signal; without a warning, time and signal must not stand in the script
        parameters: dict[str, Any] = {
            "job_name": spec.name,
            "partition": placement.partition,
            "account": placement.account,
            "time": None,
            "nodes": spec.nodes,
            "ntasks_per_node": spec.tasks,
            "gpus_per_node": spec.gpus or None,
            "cpus_per_task": placement.cpus_per_task,
            "mem": None if placement.memory_gb is None else f"{int(placement.memory_gb * 1024)}M",
            "exclude": ",".join(placement.exclude) or None,
            "dependency": spec.dependency,
            "wckey": None,
            "stderr_to_stdout": True,
            "signal_delay_s": 0 if placement.warning is None else int(placement.warning.total_seconds()),
            "setup": self._setup(spec, directory),
            "teardown": self._teardown(spec),
            "srun_args": self._srun_arguments(spec, placement, directory),
            "additional_parameters": additional,
        }
        if spec.array is not None and spec.array.at_once is not None:
            parameters["array_parallelism"] = spec.array.at_once
        elif spec.array is not None:
            parameters["array_parallelism"] = spec.array.count
        return parameters

    def _setup(self, spec: JobSpec, directory: Path) -> list[str]:
        lines = [
            "# The working directory may hold a package called jobs; it must not stand before Muster's own.",
            "export PYTHONSAFEPATH=1",
            'export MUSTER_PYTHONPATH="${PYTHONPATH-}"  # given back to your command by jobs.entry',
            f"export PYTHONPATH={shlex.quote(root)}" if (root := self._root_on_python_path()) else "unset PYTHONPATH",
            f"export MUSTER_RUN_DIRECTORY={shlex.quote(str(directory))}",
        ]
        for name, value in sorted(spec.environment.items()):
            lines.append(f"export {'MUSTER_PYTHONPATH' if name == 'PYTHONPATH' else name}={shlex.quote(value)}")
        return lines

    def _root_on_python_path(self) -> str | None:
        """Return the directory that holds Muster if it is only found through PYTHONPATH."""
        root = Path(jobs.__file__).resolve().parent.parent
        entries = [
            Path(entry).resolve() for entry in self._environment.get("PYTHONPATH", "").split(os.pathsep) if entry
        ]
        return str(root) if root in entries else None

    def _teardown(self, spec: JobSpec) -> list[str]:
        run = '"$MUSTER_RUN_DIRECTORY"' if spec.array is None else '"$MUSTER_RUN_DIRECTORY/$SLURM_ARRAY_TASK_ID"'
        python = shlex.quote(sys.executable) + (" -I" if sys.version_info < (3, 11) else "")
        return [
            "# All ranks may have been killed at once, before one of them could say whether the job is to come back.",
            "status=$?",
            'if [ "$status" -ne 0 ]; then',
            f'    {python} -m jobs.requeue --run-directory {run} --status "$status" --retries {spec.allowed_retries}',
            "    status=$?",
            "fi",
            'exit "$status"',
        ]

    def _srun_arguments(self, spec: JobSpec, placement: Placement, directory: Path) -> list[str]:
        arguments = ["--kill-on-bad-exit=1"]
        if placement.cpus_per_task is not None:
            arguments.append(
                f"--cpus-per-task={placement.cpus_per_task}"
            )  # srun no longer takes it from sbatch (22.05)
        if spec.container is not None:
            mounts = [f"{directory}:{directory}", *spec.container.mounts]
            arguments += [f"--container-image={spec.container.image}", f"--container-mounts={','.join(mounts)}"]
        return arguments

    def _check_containers(self) -> None:
        known = self._shell.run(["srun", "--help"], timeout_s=_PROBE_TIMEOUT_S, check=False).stdout
        if "--container-image" not in known:
            raise MissingError(
                "container: srun on this cluster knows no --container-image, so the pyxis plugin is not installed; "
                "leave container out, or ask the cluster's admin for pyxis"
            )


class _Executor(submitit.SlurmExecutor):
    """submitit's executor with a submission step of our own; see the module's docstring."""

    limit_min = _UNLIMITED_MIN

    def __init__(self, folder: Path, *, slurm: SlurmClient, python: str, environment: Mapping[str, str]) -> None:
        super().__init__(folder, python=python)
        self._slurm = slurm
        self._environment = environment

    @classmethod
    def affinity(cls) -> int:
        """Say that it works without srun on this machine: `--dry-run` does."""
        return 2

    def script_text(self, array_count: int | None) -> str:
        """Return the batch script; for an array with its count."""
        parameters = dict(self.parameters)
        if array_count is not None:
            self.parameters["map_count"] = array_count
        try:
            text = str(self._make_submission_file_text(self._submitit_command_str, uid=""))
        finally:
            self.parameters = parameters
        return _tidy(text)

    def submit_tasks(self, tasks: Sequence[Task], *, is_array: bool) -> list[submitit.Job[Any]]:
        """Submit one job, or one array, and put each callable where its tasks will look for it (they wait for it)."""
        folder = Path(self.folder)
        folder.mkdir(parents=True, exist_ok=True)
        written: list[Path] = []
        try:
            for task in tasks:
                delayed = DelayedSubmission(task)
                delayed.set_timeout(self.limit_min, self.max_num_timeout)
                written.append(folder / f"{uuid.uuid4().hex}.pkl")
                delayed.dump(written[-1])
            text = self.script_text(len(tasks) if is_array else None)
            script = folder / f".{uuid.uuid4().hex}_submission.sh"
            written.append(script)
            script.write_text(text, encoding="utf-8")
            job_id = self._slurm.submit(arguments=[*self._against_environment(text), str(script)])
        except BaseException:
            for path in written:
                path.unlink(missing_ok=True)
            raise
        ids = [f"{job_id}_{index}" for index in range(len(tasks))] if is_array else [job_id]
        submitted: list[submitit.Job[Any]] = [
            self.job_class(folder=folder, job_id=each, tasks=list(range(self._num_tasks()))) for each in ids
        ]
        script.rename(folder / f"{job_id}_submission.sh")
        for job, path in zip(submitted, written, strict=False):
            job.paths.move_temporary_file(path, "submitted_pickle")
        return submitted

    def _against_environment(self, text: str) -> list[str]:
        """Repeat the script's options on the command line if an SBATCH_* variable could otherwise overrule them."""
        if not any(name.startswith("SBATCH_") for name in self._environment):
            return []
        return [f"--{o.name}" if o.value is None else f"--{o.name}={o.value}" for o in read_script(text).options]


def _tidy(text: str) -> str:
    """Leave out submitit's signal where the job is to get none, as USR2 ends a program that does not expect it."""
    lines = [
        line for line in text.rstrip().split("\n") if not (line.startswith("#SBATCH --signal=") and line.endswith("@0"))
    ]
    return "\n".join(lines) + "\n"


def _minutes(placement: Placement) -> int:
    limit = placement.expected_limit
    return _UNLIMITED_MIN if limit is None else max(1, int(limit.total_seconds() // 60))


def default_runs(cluster: ClusterSpec | None) -> Path:
    """Return where runs are kept: on the shared file system where there is one that we may write, else under here."""
    if cluster is not None and os.access(cluster.storage.shared, os.W_OK):
        return cluster.storage.shared / "runs"
    return Path.cwd() / "runs"
