"""Finding out about one job: its run directory, its log files, and everything around it that `jobs.why` explains it with."""

from __future__ import annotations

import logging
import pwd
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import TypeVar

from cluster.errors import MusterError, NotFoundError, OutsideError
from cluster.slurm import SlurmClient
from cluster.slurm_records import AccountingRecord, Job
from jobs.journal import AttemptRecord, RunDirectory
from jobs.run_folder import JOB_FILE, SLURM_FOLDER
from jobs.why import Attempt, Scene, clock

logger = logging.getLogger(__name__)

JOB_ID = re.compile(r"(\d+)(?:_(\d+))?")
_INDICES = re.compile(r"(?P<first>\d+)(?:-(?P<last>\d+))?(?::(?P<step>\d+))?")
_RECENT = timedelta(days=2)
_SHOWN_IN_HINT = 5
ResultT = TypeVar("ResultT")


@dataclass(frozen=True, kw_only=True)
class Found:
    """What is known of a job: slurmctld's view while it remembers it, and accounting's."""

    id: str
    """As the user wrote it, or the display id where a name was given."""
    job: Job | None
    records: tuple[AccountingRecord, ...]
    """Whole attempts, oldest first; empty without accounting. Those of one element where an array was asked for."""
    elements: tuple[int, ...] = ()
    """For an array asked for as a whole, the indices that are known, the one that stands for it first."""

    @property
    def element_id(self) -> str:
        """The id of one job: for an array asked for as a whole, that of its first element which has not ended."""
        return f"{self.id}_{self.elements[0]}" if self.elements else self.id

    @property
    def note(self) -> str | None:
        """Which element is shown where an array was asked for as a whole; None for anything else."""
        if not self.elements:
            return None
        count = len(self.elements)
        return f"array {self.id} has {count} element{'s' * (count > 1)}; this is {self.element_id}"

    def is_ended(self, jobs: Sequence[Job]) -> bool:
        """Say whether the one job that is shown has ended, by what Slurm says of the job that was asked for."""
        index = self.element_id.partition("_")[2]
        own = [job for job in jobs if not index or int(index) in element_indices(job.array_task)]
        return all(job.is_ended for job in own)

    @property
    def run_directory(self) -> Path | None:
        """The run directory of a job that Muster submitted; None for others, and where nobody remembers."""
        script = self.job.command if self.job is not None else None
        for text in (self.job.stdout if self.job is not None else None, script):
            if text and Path(text).parent.name == SLURM_FOLDER and (Path(text).parent.parent / JOB_FILE).exists():
                return self._element(Path(text).parent.parent)
        if self.job is not None and (self.job.stdout or script):
            return None  # its files are elsewhere; a run's job of this number is an earlier cluster's
        number = self.id.partition("_")[0]
        for base in self._places():
            for path in base.glob(f"runs/*/{SLURM_FOLDER}/{number}_submission.sh"):
                if self._may_be_of(path):
                    return self._element(path.parent.parent)
        return None

    def _may_be_of(self, script: Path) -> bool:
        """Say whether a script of this number is this job's: a cluster that is built anew counts from 1 again."""
        names = {record.name for record in self.records if record.name}
        if not names:
            return True
        lines = script.read_text(encoding="utf-8", errors="replace").splitlines()
        return any(f"#SBATCH --job-name={name}" in lines for name in names)

    def _places(self) -> list[Path]:
        directories = [record.work_dir for record in self.records if record.work_dir]
        return [Path(text) for text in dict.fromkeys(directories)] + [Path.cwd()]

    def _element(self, run: Path) -> Path:
        index = self.element_id.partition("_")[2]
        return run / index if index and (run / index / JOB_FILE).exists() else run

    def log_file(self, rank: int = 0) -> Path:
        """Return the file that the task of this rank writes to.

        Raises:
            NotFoundError: Nobody knows where it is, or there is no such rank's file.
        """
        run = self.run_directory
        if run is not None:
            folder = run / SLURM_FOLDER if (run / SLURM_FOLDER).is_dir() else run.parent / SLURM_FOLDER
            path = folder / f"{self.element_id}_{rank}_log.out"
            if path.exists() or rank == 0:
                return path
            ranks = sorted(int(name.stem.split("_")[-2]) for name in folder.glob(f"{self.element_id}_*_log.out"))
            known = f"ranks {ranks[0]} to {ranks[-1]} have" if ranks else "no rank has"
            raise NotFoundError(f"--rank {rank}: {path} does not exist; {known} written a log so far")
        if rank:
            raise NotFoundError(
                f"--rank {rank}: job {self.id} was not submitted by Muster, so all its ranks share one log"
            )
        if self.job is not None and self.job.stdout:
            return Path(self.job.stdout)
        for record in self.records:
            path = Path(record.work_dir or ".") / f"slurm-{self.id}.out"
            if path.exists():
                return path
        raise NotFoundError(
            f"job {self.id}: Slurm no longer knows where its output went, and it is in no place known to Muster"
        )


def find_job(slurm: SlurmClient, wanted: str, *, user: str) -> Found:
    """Find a job by its id (`12`, `12_3`), or the newest one by its name.

    Raises:
        NotFoundError: There is none; the message has the user's recent jobs.
    """
    job_id = wanted if JOB_ID.fullmatch(wanted) else _newest_of_name(slurm, wanted, user)
    if job_id is not None:
        jobs = slurm.jobs(job_ids=[job_id])
        records = attempts_in_accounting(slurm, job_id)
        if any(job.array_job_id == job_id for job in jobs) or any(r.id.startswith(f"{job_id}_") for r in records):
            return _find_array(job_id, jobs, records)
        exact = [candidate for candidate in jobs if job_id in {candidate.display_id, candidate.id}]
        job = next(iter([*exact, *jobs]), None)
        if job is not None or records:
            return Found(id=job_id if job is None else _id_of(job, job_id), job=job, records=tuple(records))
    raise NotFoundError(f"job {wanted}: Slurm knows no such job; {_recent(slurm, user)}")


def _find_array(job_id: str, jobs: Sequence[Job], records: Sequence[AccountingRecord]) -> Found:
    """Let one element stand for an array: the first that has not ended, else the first.

    Its own number is also the raw number of its last element, which must not be taken for the whole.
    """
    ordered = sorted(jobs, key=lambda job: (job.is_ended, element_indices(job.array_task)))
    job = next(iter(ordered), None)
    in_accounting = [element_indices(record.id.partition("_")[2]) for record in records]
    known = sorted({index for each in jobs for index in element_indices(each.array_task)}.union(*in_accounting))
    shown = known[:1] if job is None else element_indices(job.array_task)[:1]
    element_id = "".join(f"{job_id}_{index}" for index in shown)
    return Found(
        id=job_id,
        job=job,
        records=tuple(record for record in records if record.id == element_id or not shown),
        elements=(*shown, *(index for index in known if index not in shown)),
    )


def element_indices(text: str | None) -> list[int]:
    """Return the indices in what Slurm writes for elements of an array: `3`, `4-9%2`, `[0-6:2,9]`; ascending."""
    indices: set[int] = set()
    for match in _INDICES.finditer((text or "").partition("%")[0]):
        first = int(match["first"])
        indices.update(range(first, int(match["last"] or first) + 1, int(match["step"] or 1)))
    return sorted(indices)


def _id_of(job: Job, asked: str) -> str:
    """Return the name of what was asked for; a raw number becomes that of its element."""
    return job.display_id if job.array_task is not None and job.array_task.isdigit() else asked


def attempts_in_accounting(slurm: SlurmClient, job_id: str) -> list[AccountingRecord]:
    """Return the job's attempts, of an array those of all elements, oldest first; nothing where there is no accounting."""
    try:
        records = slurm.accounting(job_ids=[job_id])
    except OutsideError as error:
        logger.info("accounting: %s", error)
        return []
    whole = [record for record in records if record.step is None]
    own = [r for r in whole if job_id in {r.id, r.raw_id} or r.id.startswith(f"{job_id}_")]
    return [replace(record, cancelled_by=_user_name(record.cancelled_by)) for record in own]


def _user_name(user: str | None) -> str | None:
    """Turn the number that Slurm gives into a login name, where this machine knows it."""
    if user is None or not user.isdecimal():
        return user
    try:
        return pwd.getpwuid(int(user)).pw_name
    except KeyError:
        return f"user {user}"


def _newest_of_name(slurm: SlurmClient, name: str, user: str) -> str | None:
    jobs = [job for job in slurm.jobs() if job.name == name]
    own = [job for job in jobs if job.user == user] or jobs
    ids = {job.array_job_id or job.id for job in own}  # a name means a whole array, never one element of it
    return max(ids, key=lambda number: int(number) if number.isdecimal() else 0, default=None)


def _recent(slurm: SlurmClient, user: str) -> str:
    now = datetime.now(timezone.utc)
    jobs = [job for job in slurm.jobs() if job.user == user]
    known = {job.display_id: f"{job.display_id} ({job.name}, {job.state.lower()})" for job in jobs}
    try:
        for record in slurm.accounting(users=[user], since=now - _RECENT):
            if record.step is None:
                known.setdefault(record.id, f"{record.id} ({record.name}, {record.state.lower()})")
    except OutsideError as error:
        logger.info("accounting: %s", error)
    newest = sorted(known, key=lambda text: [int(number) for number in re.findall(r"\d+", text)])[-_SHOWN_IN_HINT:]
    if not newest:
        return f"{user} has had no jobs in the last {_RECENT.days} days; `muster jobs list --all` shows everybody's"
    return f"your latest are {', '.join(known[number] for number in reversed(newest))}"


def gather(slurm: SlurmClient, found: Found, *, now: datetime) -> Scene:
    """Ask for everything that explains this job. What cannot be read is named in the scene and does not stop the rest."""
    unread: list[str] = []

    def ask(what: str, question: Callable[[], Sequence[ResultT]]) -> tuple[ResultT, ...]:
        try:
            return tuple(question())
        except MusterError as error:
            unread.append(f"{what} ({str(error).splitlines()[0]})")
            return ()

    job = found.job
    waiting = job is not None and job.is_pending
    start = None
    if job is not None and waiting:
        raw = job.id
        start = next(iter(ask("the expected start", lambda: [slurm.expected_start(raw)])), None)
    return Scene(
        now=now,
        job=job,
        records=found.records,
        jobs=ask("other jobs", slurm.jobs) if waiting else (),
        nodes=ask("nodes", slurm.nodes) if waiting else (),
        partitions=ask("queues", slurm.partitions) if waiting else (),
        priorities=ask("priorities", lambda: slurm.priorities([job.id])) if job is not None and waiting else (),
        expected_start=start,
        attempts=tuple(journal_attempts(found.run_directory, _numbers_in_journal(found))),
        unread=tuple(unread),
    )


def _numbers_in_journal(found: Found) -> set[str]:
    """Return the numbers by which a journal may know this job: element 3 of array 12 has a raw number of its own."""
    known = {found.element_id, *(record.raw_id for record in found.records)}
    return known if found.job is None else {*known, found.job.id}


def journal_attempts(run: Path | None, numbers: Collection[str]) -> list[Attempt]:
    """Return what the run's own journal says about the attempts of this job; nothing where it keeps none.

    Args:
        run: Its run directory, which several jobs may have worked on, one after the other.
        numbers: The raw numbers that Slurm gave the job.
    """
    if run is None:
        return []
    records = RunDirectory(run).attempts()
    own = [record for record in records if record.job_id is None or record.job_id in numbers]
    return [_as_attempt(record) for record in own]


def _as_attempt(record: AttemptRecord) -> Attempt:
    steps = f"steps {record.first_step} to {record.last_step}" if record.last_step else ""
    lost = ""
    if steps and record.ended is not None:
        lost = f"{record.seconds_lost:.0f} s lost" if record.seconds_lost else "nothing lost"
    outcome = "" if record.reason is None else record.reason.value
    if record.message:
        outcome += f" ({record.message})"
    if record.failing_rank is not None:
        outcome += f"; rank {record.failing_rank} on {record.failing_node} failed first"
    return Attempt(
        number=record.number,
        started=record.started,
        ended=record.ended,
        outcome=outcome,
        nodes=record.nodes,
        detail=", ".join(part for part in (steps, lost) if part),
    )


def describe_time(when: datetime | None, now: datetime) -> str:
    """Write a time for a table; nothing where it is not known."""
    return "" if when is None else clock(when, now)
