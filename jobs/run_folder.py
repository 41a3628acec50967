"""The part of a run directory that submission owns: `job.yaml` and `slurm/`, claimed for one job at a time.

    RUN/job.yaml                 the job as it was submitted, every default that the file or --set gave
    RUN/slurm/                   submitit's: <id>_submission.sh, <id>_submitted.pkl, <id>_<rank>_log.out
    RUN/0/ RUN/1/ ...            the elements of an array, each with a job.yaml of its own

Everything else in it (checkpoints, journal, pictures) belongs to the program that runs there.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from cluster.errors import JobError, StateError
from cluster.slurm import SlurmClient
from cluster.slurm_records import Job
from cluster.yamlfile import dump_yaml
from jobs.jobspec import JobSpec, read_job
from jobs.journal import RunDirectory

JOB_FILE = "job.yaml"
SLURM_FOLDER = "slurm"
_NO_LOCKS_HERE = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}  # Lustre mounted without -o flock


class RunFolder:
    """One run directory, seen by who submits."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def slurm(self) -> Path:
        """Where submitit keeps scripts, pickles and logs."""
        return self.path / SLURM_FOLDER

    def job_ids(self) -> list[str]:
        """Return the ids of the jobs (of arrays: the array's) that were submitted for this run, oldest first."""
        names = (path.name.partition("_")[0] for path in self.slurm.glob("[0-9]*_submission.sh"))
        return sorted({name for name in names if name.isdecimal()}, key=int)

    @contextlib.contextmanager
    def claimed(self, slurm: SlurmClient, spec: JobSpec) -> Iterator[None]:
        """Hold the run directory while `spec` is submitted for it; put everything back if that fails.

        Raises:
            StateError: A live job uses it, its run is finished, or another submission is going on.
            JobError: It cannot be made, or written.
        """
        made = _make(self.path)
        kept: dict[Path, bytes | None] = {}
        self._kept = kept
        before = set(self.path.iterdir()) if made is None else set()
        lock = os.open(self.path, os.O_RDONLY)
        try:
            self._lock(lock)
            self._refuse_if_in_use(slurm, spec)
            try:
                yield
            except BaseException:
                self._put_back(kept, before)
                raise
        except BaseException:
            if made is not None:
                shutil.rmtree(made, ignore_errors=True)
            raise
        finally:
            os.close(lock)

    def write_job(self, directory: Path, spec: JobSpec) -> None:
        """Write `job.yaml` of this run, or of one element of it, beside and then renamed. Only inside `claimed`."""
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / JOB_FILE
        self._kept[path] = path.read_bytes() if path.exists() else None
        beside = path.with_suffix(".new")
        beside.write_text(dump_yaml(spec.model_dump(mode="json", exclude_unset=True)), encoding="utf-8")
        beside.replace(path)

    def _lock(self, lock: int) -> None:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StateError(f"{self.path}: another submission for this run is going on; wait for it") from error
        except OSError as error:
            if error.errno not in _NO_LOCKS_HERE:
                raise

    def _refuse_if_in_use(self, slurm: SlurmClient, spec: JobSpec) -> None:
        ids = self.job_ids()
        live = [job for job in slurm.jobs(job_ids=ids) if not job.is_ended and self._may_be_of(job)] if ids else []
        if live:
            job = live[0]
            raise StateError(
                f"{self.path}: job {job.display_id} uses this run ({job.state.lower()}); watch it with "
                f"`muster jobs logs -f {job.display_id}`, end it with `muster jobs cancel {job.display_id}`, "
                f"or choose another name or run_directory"
            )
        elements = sorted(path.parent for path in self.path.glob(f"[0-9]*/{JOB_FILE}")) or [self.path]
        if all(RunDirectory(element).is_finished for element in elements):
            raise StateError(
                f"{self.path}: this run is finished; choose another name or run_directory, or remove it to do it again"
            )
        self._settle_failures(elements, spec)

    def _may_be_of(self, job: Job) -> bool:
        """Say whether a job was submitted for this run, for all that Slurm says of its files.

        Its number proves nothing: a cluster that is built anew counts from 1 again.
        """
        known = [Path(text) for text in (job.stdout, job.command) if text]
        return not known or any(is_same_directory(path.parent, self.slurm) for path in known)

    def _settle_failures(self, elements: Iterable[Path], spec: JobSpec) -> None:
        """Refuse a training that has given up until it is cleared; to submit anything else again clears it."""
        for element in elements:
            run = RunDirectory(element)
            if run.failure is None:
                continue
            if spec.kind != "training":
                run.clear_failures()
                continue
            raise StateError(
                f"{element}: this run has given up:\n{run.failure.rstrip()}\n"
                f"When the cause is mended, `muster jobs clear {element}`, and submit it again"
            )

    def _put_back(self, kept: dict[Path, bytes | None], before: set[Path]) -> None:
        for path, content in kept.items():
            if content is None:
                path.unlink(missing_ok=True)
            else:
                path.write_bytes(content)
        for path in set(self.path.iterdir()) - before:  # what this submission made: slurm/, the elements of an array
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)


def read_run(directory: Path) -> JobSpec:
    """Read the job that a run directory was submitted with.

    Raises:
        InputError: There is none, or it is no longer valid.
    """
    return read_job(directory / JOB_FILE)


def is_same_directory(one: Path, other: Path) -> bool:
    """Say whether two paths lead to one place (/fsx may be a link to /lustre/...); what is not there has its path only."""
    return os.path.realpath(one) == os.path.realpath(other)


def _make(path: Path) -> Path | None:
    """Make a directory with its parents; return the uppermost one that is new, or None where it was there."""
    missing = None
    probe = path
    while not probe.exists():
        missing, probe = probe, probe.parent
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if missing is not None:
            shutil.rmtree(missing, ignore_errors=True)
        raise JobError(
            f"run_directory ({path}): cannot be made: {error.strerror}; choose one that you may write to"
        ) from error
    return missing
