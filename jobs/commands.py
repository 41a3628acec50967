"""`muster submit`, `muster sbatch` and `muster jobs`: what people type. Everything that decides lies in the modules beside."""

from __future__ import annotations

import getpass
import logging
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from cluster.errors import InputError, JobError, NotFoundError, OutsideError, StateError
from cluster.output import as_plain, console, error_console, print_json, print_table

if TYPE_CHECKING:
    from cluster.settings import ClusterSpec
    from cluster.slurm import SlurmClient
    from jobs.jobspec import JobSpec
    from jobs.lookup import Found

logger = logging.getLogger(__name__)

jobs_app = typer.Typer(no_args_is_help=True, help="List, show, follow, explain and cancel jobs.")

_SLURM_CONF_PLACES = (
    "/etc/slurm/slurm.conf",
    "/etc/slurm-llnl/slurm.conf",
    "/opt/slurm/etc/slurm.conf",  # ParallelCluster
    "/usr/local/etc/slurm.conf",
    "/run/slurm/conf/slurm.conf",  # configless
)

JobArgument = Annotated[str, typer.Argument(help="Id (12, 12_3), or a name: then the newest job of that name.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def submit(
    job: Annotated[Path, typer.Argument(help="A job description, or the name of a ready-made one.")],
    queue: Annotated[str | None, typer.Option("--queue", "-q", help="Queue to submit to.")] = None,
    nodes: Annotated[int | None, typer.Option("--nodes", "-N", help="Number of nodes.")] = None,
    name: Annotated[str | None, typer.Option("--name", "-J", help="Name of the job and of its run directory.")] = None,
    project: Annotated[str | None, typer.Option("--project", "-A", help="Project (Slurm account).")] = None,
    time_limit: Annotated[
        str | None, typer.Option("--time", "-t", help="Longest run of one attempt: 90m, 48h.")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a value: config.steps=500. As often as you like."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the exact batch script; write and submit nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Submit a job description to a queue.

    Ready-made jobs are found by name; muster submit --dry-run --json NAME shows the job beside its batch script.
    """
    from jobs.jobspec import read_job
    from jobs.queues import find_cluster
    from jobs.submit import Launcher

    changes = list(overrides or [])
    for key, value in (("queue", queue), ("nodes", nodes), ("name", name), ("project", project), ("time", time_limit)):
        changes += [] if value is None else [f"{key}={_as_yaml(value)}"]
    spec = read_job(_job_file(job), overrides=changes)
    cluster, where = find_cluster(os.environ)
    if cluster is None:
        logger.warning("%s; queue, project and sizes are left to Slurm, unchecked", where)
    launcher = Launcher(cluster, _slurm(), avoided_nodes=avoided_nodes(cluster))
    if dry_run:
        text = launcher.script(spec)
        if as_json:
            job_file = spec.model_dump(mode="json", exclude_unset=True)
            print_json({"script": text, "job": job_file, "run_directory": str(launcher.run_directory(spec))})
        else:
            sys.stdout.write(text)
        return
    submitted = [launcher.submit(spec)] if spec.array is None else launcher.submit_array(spec)
    _report_submission(spec, submitted, launcher.run_directory(spec), as_json=as_json)


def _report_submission(spec: JobSpec, submitted: Sequence[Any], directory: Path, *, as_json: bool) -> None:
    first = str(submitted[0].job_id)
    shown = first if spec.array is None else first.partition("_")[0]
    if as_json:
        print_json(
            {
                "job_id": shown,
                "jobs": [str(job.job_id) for job in submitted],
                "name": spec.name,
                "run_directory": str(directory),
            }
        )
        return
    count = "" if spec.array is None else f" ({len(submitted)} elements)"
    console().print(f"submitted {spec.name} as job {shown}{count}, kept in {directory}", highlight=False)
    error_console().print(f"muster jobs logs -f {first}   muster jobs why {first}", highlight=False, style="dim")


def _as_yaml(value: object) -> str:
    """Quote a value from an option of its own, so that `--name 007` stays a string."""
    return str(value) if isinstance(value, int) else "'" + str(value).replace("'", "''") + "'"


def _job_file(given: Path) -> Path:
    """Return the file itself, or the ready-made job of that name."""
    ready = Path(__file__).parent / "definitions"
    if given.exists() or given.suffix or given.parent != Path():
        if not given.exists():
            raise InputError(f"{given}: there is no such file; ready-made jobs: {_ready_made(ready)}")
        return given
    path = ready / f"{given}.yaml"
    if not path.exists():
        raise InputError(
            f"{given}: neither a file here nor a ready-made job; the ready-made ones are: {_ready_made(ready)}"
        )
    return path


def _ready_made(folder: Path) -> str:
    return ", ".join(sorted(path.stem for path in folder.glob("*.yaml"))) or "none"


def avoided_nodes(cluster: ClusterSpec | None) -> list[str]:
    """Return the nodes that jobs should stay away from. None yet: the health controller will name them."""
    del cluster
    return []


def sbatch(context: typer.Context) -> None:
    """Sbatch as ever; requeue, append-mode logs, queue and account are filled in where you gave none.

    muster -v sbatch ... shows what was added. The output and the exit code are sbatch's own.
    """
    from cluster.hostlist import expand
    from jobs.sbatch import Defaults, plan_sbatch, read_command_line, read_script

    arguments = list(context.args)
    line = read_command_line(arguments)
    if any(option.name == "verbose" for option in line.options):
        logging.getLogger("jobs").setLevel(logging.INFO)
        logging.getLogger().handlers[0].setLevel(logging.INFO)
    cluster = _cluster_for_sbatch()
    standard_input = sys.stdin.buffer.read() if line.reads_standard_input else None
    text = _script_text(line.script, line.options, standard_input)
    defaults = Defaults()
    if cluster is not None:
        from jobs.queues import choose_account

        known = cluster
        user = getpass.getuser()
        defaults = Defaults(
            partition=cluster.default_queue().name,
            account_of=lambda partition: choose_account(known, partition, user=user),
            avoided_nodes=tuple(avoided_nodes(cluster)),
        )
    plan = plan_sbatch(arguments, script=read_script(text), environment=os.environ, defaults=defaults, expand=expand)
    for addition in plan.additions:
        logger.info("added %s: %s", addition.flag, addition.why)
    for note in plan.notes:
        logger.info("left alone: %s", note)
    _become_sbatch(plan.arguments, standard_input)


def _cluster_for_sbatch() -> ClusterSpec | None:
    from jobs.queues import find_cluster

    try:
        cluster, where = find_cluster(os.environ)
    except InputError as error:  # the habit of a lifetime must work even where our own file is broken
        cluster, where = None, str(error)
    if cluster is None:
        logger.info("%s; queue and account are left to Slurm", where)
    return cluster


def _script_text(script: str | None, options: Sequence[Any], standard_input: bytes | None) -> str:
    """Return the batch script's text where it can be found as sbatch finds it; sbatch itself complains where it cannot."""
    if standard_input is not None:
        return standard_input.decode(errors="replace")
    if script is None:
        return ""
    chdir = next((option.value for option in reversed(options) if option.name == "chdir" and option.value), ".")
    candidates = [Path(chdir) / script]
    if "/" not in script:
        candidates += [Path(folder) / script for folder in os.environ.get("PATH", "").split(os.pathsep) if folder]
    for path in candidates:
        try:
            return path.read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
    return ""


def _become_sbatch(arguments: Sequence[str], standard_input: bytes | None) -> NoReturn:
    """Replace this process by sbatch, so that terminal, signals, output and exit code are its own (`--wait` may take days)."""
    from cluster.shell import find_program

    program = find_program("sbatch")
    if "SLURM_CONF" not in os.environ and not any(Path(place).exists() for place in _SLURM_CONF_PLACES):
        logger.warning('no slurm.conf in sight; for the cluster on this machine run `eval "$(muster local env)"` first')
    logger.info("running %s", shlex.join(["sbatch", *arguments]))
    if standard_input is not None:
        with tempfile.TemporaryFile() as file:
            file.write(standard_input)
            file.seek(0)
            os.dup2(file.fileno(), 0)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(program, ["sbatch", *arguments])  # noqa: S606 - an argument list, no shell


@jobs_app.command("list")
def list_jobs(
    as_json: AsJson = False,
    user: Annotated[str | None, typer.Option("--user", "-u", help="Jobs of this user; yours by default.")] = None,
    queue: Annotated[str | None, typer.Option("--queue", "-q", help="Jobs of this queue.")] = None,
    everything: Annotated[
        bool, typer.Option("--all", "-a", help="Everybody's jobs, and those that ended a while ago.")
    ] = False,
) -> None:
    """List jobs: yours that wait or run, and those that ended just now. --all for everybody's, and earlier ones."""
    from jobs.listing import job_rows, job_table

    slurm = _slurm()
    users = [user] if user is not None else [] if everything else [getpass.getuser()]
    if queue is not None:
        names = [partition.name for partition in slurm.partitions()]
        if queue not in names:
            from jobs.queues import nearest

            raise NotFoundError(f"queue {queue}: there is no such queue; {nearest(queue, names, 'the queues are')}")
    rows = job_rows(slurm, users=users, queue=queue, with_past=everything)
    if as_json:
        print_json([row.as_dict() for row in rows])
        return
    if not rows:
        whose = "nobody has any jobs" if not users else f"{users[0]} has no jobs"
        error_console().print(
            f"{whose}{f' in queue {queue}' if queue else ''}; --all shows everybody's and earlier ones", highlight=False
        )
        return
    columns, cells = job_table(rows, now=_now(), with_user=not users)
    print_table(columns, cells, styles={"job": "cyan"})


@jobs_app.command("show")
def show(job: JobArgument, as_json: AsJson = False) -> None:
    """Show one job: what it asked for, where it runs, where its files are, its attempts."""
    from jobs.listing import job_details
    from jobs.lookup import find_job

    found = find_job(_slurm(), job, user=getpass.getuser())
    _say_which_element(found)
    if as_json:
        run = found.run_directory
        print_json({"job": as_plain(found.job), "attempts": as_plain(list(found.records)), "run_directory": run})
        return
    out = console()
    for name, value in job_details(found, now=_now()):
        out.print(f"{name:<16} {value}", highlight=False, markup=False)


@jobs_app.command("logs")
def logs(
    job: JobArgument,
    follow_it: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on as it writes, over requeues, until the job ends.")
    ] = False,
    rank: Annotated[int, typer.Option("--rank", "-r", min=0, help="Rank of the task.")] = 0,
    lines: Annotated[
        int | None, typer.Option("--lines", "-n", min=0, help="Only the last lines; all by default.")
    ] = None,
) -> None:
    """Print what a job has written; with -f go on until it ends."""
    from jobs.follow import follow, read_tail
    from jobs.lookup import find_job

    slurm = _slurm()
    found = find_job(slurm, job, user=getpass.getuser())
    _say_which_element(found)
    path = found.log_file(rank)
    offset = 0
    if path.exists():
        text, offset = read_tail(path, lines)
        sys.stdout.write(text)
        sys.stdout.flush()
        if offset == 0 and not follow_it:
            has_ended = found.job is None or found.job.is_ended
            error_console().print(f"(nothing written{'' if has_ended else ' yet'})", highlight=False)
    elif not follow_it:
        state = found.job.state.lower() if found.job is not None else "gone"
        raise NotFoundError(
            f"job {found.id}: has written nothing yet ({path}); it is {state}: muster jobs why {found.id}"
        )
    if not follow_it:
        return

    def is_over() -> bool:
        try:
            remembered = slurm.jobs(job_ids=[found.id])
        except OutsideError as error:  # a controller that is busy, or starts anew, says nothing about the job
            logger.info("cannot ask Slurm about job %s: %s", found.id, error)
            return False
        return found.is_ended(remembered)

    for chunk in follow(path, offset=offset, is_over=is_over, sleep=time.sleep):
        sys.stdout.write(chunk)
        sys.stdout.flush()


@jobs_app.command("cancel")
def cancel(
    jobs: Annotated[list[str], typer.Argument(help="Ids or names.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Cancel jobs. More than one, or a whole array, is asked about first."""
    from jobs.lookup import find_job

    slurm = _slurm()
    user = getpass.getuser()
    found = [find_job(slurm, job, user=user) for job in dict.fromkeys(jobs)]
    over = [each for each in found if each.job is None or each.job.is_ended]
    if over:
        states = ", ".join(f"job {each.id} is {_last_state(each).lower()}" for each in over)
        raise StateError(f"{states}: nothing to cancel there; leave it out")
    ids = list(dict.fromkeys(each.id for each in found))
    arrays = {each.id: len(each.elements) for each in found if len(each.elements) > 1}
    if (len(ids) > 1 or arrays) and not yes:
        for each in found:
            name = each.job.name if each.job is not None else ""
            whole = f", an array of {arrays[each.id]}" if each.id in arrays else ""
            error_console().print(f"  {each.id} {name}{whole}", highlight=False, markup=False)
        if not sys.stdin.isatty():
            what = f"{len(ids)} jobs" if len(ids) > 1 else "a whole array"
            raise JobError(f"{what} would be cancelled and nobody can be asked; add --yes")
        if not typer.confirm(f"Cancel {'these' if len(ids) > 1 else 'this array'}?", err=True):
            raise typer.Exit(1)
    slurm.cancel(ids)
    console().print(f"cancelled {', '.join(ids)}", highlight=False)


def _say_which_element(found: Found) -> None:
    """Tell who asked for a whole array which of its elements is shown; on standard error, where no script reads it."""
    if found.note is not None:
        error_console().print(found.note, highlight=False, markup=False, soft_wrap=True)


def _last_state(found: Any) -> str:
    return str(found.job.state if found.job is not None else found.records[-1].state)


@jobs_app.command("clear")
def clear(job: Annotated[str, typer.Argument(help="Id or name of a job, or a run directory.")]) -> None:
    """Let a run that has given up after too many failures try again, once its cause is mended."""
    from jobs.journal import RunDirectory
    from jobs.lookup import find_job

    directory = Path(job) if Path(job).is_dir() else find_job(_slurm(), job, user=getpass.getuser()).run_directory
    if directory is None:
        raise NotFoundError(f"job {job}: was not submitted by Muster, so it has no run directory")
    run = RunDirectory(directory)
    if run.failure is None:
        raise StateError(f"{directory}: this run has not given up, so there is nothing to clear")
    run.clear_failures()
    console().print(f"{directory}: may try again; submit it", highlight=False)


@jobs_app.command("why")
def why(job: JobArgument, as_json: AsJson = False) -> None:
    """Explain in words why a job waits, was requeued, or ended."""
    from jobs.lookup import find_job, gather
    from jobs.why import explain

    slurm = _slurm()
    found = find_job(slurm, job, user=getpass.getuser())
    _say_which_element(found)
    explanation = explain(found.id, gather(slurm, found, now=_now()))
    if as_json:
        print_json(as_plain(explanation))
        return
    out = console()
    out.print(explanation.headline, style="bold", highlight=False, markup=False)
    for fact in explanation.facts:
        out.print(fact, highlight=False, markup=False)
    for line in explanation.attempts:
        out.print(f"  {line}", highlight=False, markup=False)
    for step in explanation.next_steps:
        out.print(f"-> {step}", highlight=False, markup=False, style="cyan")


def _slurm() -> SlurmClient:
    from cluster.slurm import SlurmCliClient

    return SlurmCliClient()


def _now() -> datetime:
    return datetime.now(timezone.utc)
