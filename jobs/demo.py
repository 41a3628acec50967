"""`make demo`: the main job from end to end, on real Slurm daemons, with everything it reports measured in that run.

The story: a cluster comes up; a job in the low queue renders emoji into shards; a diffusion model trains on them over two
nodes, in the low queue; a high-priority job needs those nodes; training saves, gives way, comes back and finishes. Meanwhile
the same training runs once more without being stopped, long enough to compare the losses after the resume, bit by bit.
"""

from __future__ import annotations

import importlib.resources
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster.errors import InputError, OutsideError, StateError
from cluster.output import console

if TYPE_CHECKING:
    from cluster.local import LocalCluster
    from cluster.settings import ClusterSpec
    from cluster.slurm import SlurmClient
    from cluster.slurm_records import Job
    from jobs.demo_report import DemoReport
    from jobs.demo_screen import Screen
    from jobs.jobspec import JobSpec
    from jobs.submit import Launcher

CLUSTER_NAME = "muster-demo"
MARKER = "made-by-muster-demo"
PREEMPT_AT_STEP = 25
"""The high-priority job arrives when this step is done: early, so that the reference is short, and mid-epoch."""
STEPS_AFTER_RESUME = 25
"""How far the reference goes on beyond the step at which training was stopped."""
_POLL_S = 0.2
_STAGE_S = 900.0  # a chapter that takes longer is stuck; the last one has more time for every step
_SLOWEST_STEP_S = 20.0


def demo(
    steps: Annotated[
        int | None, typer.Option(min=60, help="Training steps; the default fits six minutes on two cores.")
    ] = None,
    size: Annotated[
        int | None, typer.Option(min=8, max=256, help="Width and height of the pictures in pixels.")
    ] = None,
    directory: Annotated[Path, typer.Option(help="Where shards, runs, pictures and the report go.")] = Path(
        ".muster/demo"
    ),
    keep: Annotated[bool, typer.Option("--keep", help="Leave the cluster up when the demo is over.")] = False,
) -> None:
    """Train on a real Slurm cluster on this machine, be preempted, come back, finish, and prove it.

    Leaves pictures and `report.json` in the directory. Exit code 5 if the run did not prove what it is for.
    """
    from jobs.demo_screen import Screen

    with Screen(console()) as screen:
        story = Story(screen, _own_directory(directory), steps=steps, size=size)
        with story.cluster_up(keep=keep):
            report = story.run()
    _print_summary(screen, report, directory)
    if not (
        report.resumed_bit_equal and report.preemptions and not report.samples_repeated and not report.samples_missed
    ):
        raise OutsideError(
            f"the run did not prove what it is for; look into {directory / 'report.json'} and {directory / 'runs'}"
        )


@dataclass
class Story:
    """The demo, a method a chapter."""

    screen: Screen
    directory: Path
    steps: int | None = None
    size: int | None = None

    def __post_init__(self) -> None:
        self.runs = self.directory / "runs"
        self.job_ids: list[str] = []
        self.nodes_free_at: datetime | None = None

    # ---- the cluster

    @contextmanager
    def cluster_up(self, *, keep: bool) -> Iterator[None]:
        """Have a cluster for as long as the block runs."""
        from cluster.local import LocalCluster
        from cluster.local_start import Step
        from cluster.slurm import SlurmCliClient
        from jobs.submit import Launcher

        self.cluster: LocalCluster = LocalCluster(CLUSTER_NAME)
        self.spec: ClusterSpec = _cluster_spec()

        def show(step: Step) -> None:
            done = f" {step.done}/{step.total}" if step.total > 1 else ""
            self.screen.now(f"starting the cluster: {step.name}{done}")

        self.screen.now("starting the cluster: munge, MariaDB, slurmdbd, slurmctld, a slurmd for each node")
        self.cluster.up(self.spec, show)
        names = [name for name, _ in self.spec.nodes()]
        gpus = sum(pool.nodes * pool.gpus_per_node for pool in self.spec.pools)
        self.screen.event(
            "cluster up",
            f"{len(names)} nodes, {gpus} simulated GPUs, queues {', '.join(q.name for q in self.spec.queues)}",
        )
        environment = self.cluster.environment()
        self.slurm: SlurmClient = SlurmCliClient(environment=environment)
        self.launcher: Launcher = Launcher(
            self.spec, self.slurm, runs=self.runs, environment={**os.environ, **environment}
        )
        try:
            yield
        finally:
            if keep:
                self.screen.event("cluster kept", f'eval "$(muster local env --name {CLUSTER_NAME})"')
            else:
                self.screen.now("taking the cluster down")
                self.cluster.down()
                self.screen.event("cluster down", "no process and no file of it is left")

    # ---- the chapters

    def run(self) -> DemoReport:
        """Play all chapters and write the report."""
        shards = self.preprocess()
        training, train_spec = self.start_training(shards)
        stopped_at, waited_s = self.interrupt(training)
        reference = self.start_reference(train_spec)
        self.finish(training, train_spec, reference, reference_steps=stopped_at + STEPS_AFTER_RESUME)
        report = self.measure(shards, train_spec, training, stopped_at=stopped_at, high_waited_s=waited_s)
        report.write(self.directory / "report.json")
        return report

    def preprocess(self) -> Path:
        """Render the pictures, as a job in the low queue."""
        shards = self.directory / "shards"
        overrides = [f"config.output={shards}"]
        if self.size is not None:
            overrides.append(f"config.image.size_px={self.size}")
        spec = _definition("preprocess-emoji", overrides, run_directory=self.runs / "preprocess")
        job_id = self.submit(spec)
        self.screen.event(
            "preprocessing",
            f"job {job_id} in the {spec.queue or self.spec.default_queue().name} queue renders emoji into tar shards",
        )
        self.wait_for(
            job_id,
            spec,
            lambda: self.job(job_id).is_ended,
            lambda: f"rendering: job {job_id} is {self.job(job_id).state.lower()}",
        )
        self.require_success(job_id, spec)
        from jobs.data import ShardDataset

        self.screen.event("shards ready", f"{len(ShardDataset(shards, max_bad=0))} pictures with captions")
        return shards

    def start_training(self, shards: Path) -> tuple[str, JobSpec]:
        """Start training in the low queue and wait for the step at which it will be interrupted."""
        overrides = [f"config.data.directory={shards}", "config.record_samples=true"]
        if self.steps is not None:
            overrides.append(f"config.steps={self.steps}")
        spec = _definition("train-emoji", overrides, run_directory=self.runs / "train")
        job_id = self.submit(spec)
        self.screen.event(
            "training", f"job {job_id} in the low queue on {spec.nodes} nodes, {spec.config['steps']} steps"
        )
        self.wait_for(
            job_id,
            spec,
            lambda: len(self.steps_of("train")) >= PREEMPT_AT_STEP,
            lambda: f"training: step {len(self.steps_of('train'))}, job {job_id} is {self.job(job_id).state.lower()}",
        )
        return job_id, spec

    def interrupt(self, training: str) -> tuple[int, float]:
        """Let a high-priority job take the nodes. Returns the step training stopped at, and the seconds the high job waited."""
        nodes = sum(pool.nodes for pool in self.spec.pools)
        whole = {
            "nodes": nodes,
            "gpus_per_node": min(pool.gpus_per_node for pool in self.spec.pools),
            "tasks_per_node": 1,
        }
        changes = {"name": "urgent", "queue": "high", "run_directory": self.runs / "urgent", **whole}
        high = _definition("all-reduce", []).model_copy(update=changes)
        submitted = time.monotonic()
        high_id = self.submit(high)
        self.screen.event(
            "high priority job", f"job {high_id} needs all {nodes} nodes, with every GPU", style="bold yellow"
        )
        self.wait_for(
            high_id,
            high,
            lambda: self.job(high_id).state != "PENDING",
            lambda: f"job {high_id} waits while training saves",
        )
        waited_s = time.monotonic() - submitted
        self.screen.event(
            "preempted",
            f"training saved and gave way; job {high_id} ran {waited_s:.1f} s after its submission",
            style="bold yellow",
        )
        stopped_at = len(self.steps_of("train"))
        self.wait_for(
            high_id,
            high,
            lambda: self.job(high_id).is_ended,
            lambda: f"job {high_id} runs, training waits ({self.job(training).reason or 'queued'})",
        )
        self.require_success(high_id, high)
        self.nodes_free_at = self.job(high_id).end_time
        self.screen.event("urgent job done", f"training will go on at step {stopped_at}")
        return stopped_at, waited_s

    def start_reference(self, training: JobSpec) -> str:
        """Run the same training without interruption, in the high queue; `finish` ends it once it has gone far enough."""
        spec = training.model_copy(
            update={"name": "reference", "queue": "high", "run_directory": self.runs / "reference"}
        )
        job_id = self.submit(spec)
        self.screen.event("reference", f"job {job_id} does the same from step 0 without a stop, to compare with")
        return job_id

    def finish(self, training: str, spec: JobSpec, reference: str, *, reference_steps: int) -> None:
        """Wait until training is over, and end the reference when it has done its part."""
        total = int(spec.config["steps"])
        back = done = False
        started = time.monotonic()
        while not (self.job(training).is_ended and done):
            if not back and any(record["attempt"] > 1 for record in self.steps_of("train").values()):
                back = True
                nodes = ", ".join(self.job(training).nodes)
                self.screen.event("training is back", f"attempt 2, on {nodes}", style="bold green")
            if not done and len(self.steps_of("reference")) >= min(reference_steps, total):
                done = True
                self.slurm.cancel([reference])
                self.screen.event(
                    "reference done", f"{reference_steps} steps are enough to compare; job {reference} ended"
                )
            if not done and self.job(reference).is_ended:
                self.require_success(reference, spec.model_copy(update={"run_directory": self.runs / "reference"}))
            if time.monotonic() - started > _STAGE_S + total * _SLOWEST_STEP_S:
                raise OutsideError(
                    f"training is not over after {time.monotonic() - started:.0f} s; {self.where_to_look(spec)}"
                )
            steps = self.steps_of("train")
            loss = f", loss {next(reversed(steps.values()))['loss']:.4f}" if steps else ""
            self.screen.now(f"training: step {len(steps)} of {total}{loss}", done=len(steps), total=total)
            time.sleep(_POLL_S)
        self.require_success(training, spec)
        self.screen.event("training finished", f"{len(self.steps_of('train'))} steps", style="bold green")

    def measure(self, shards: Path, spec: JobSpec, job_id: str, *, stopped_at: int, high_waited_s: float) -> DemoReport:
        """Compute the report from what the runs left on disk and in Slurm's accounting."""
        from jobs.data import ShardDataset
        from jobs.demo_report import (
            DemoReport,
            bars_of,
            compare_losses,
            count_run_samples,
            mean_loss,
            seconds_to_first_step,
        )
        from jobs.journal import EndReason, RunDirectory

        run = self.runs / "train"
        attempts = RunDirectory(run).attempts()
        pictures = ShardDataset(shards, max_bad=0)
        samples = count_run_samples(
            run, keys=[pictures.key(index) for index in range(len(pictures))], batch_size=int(spec.config["batch_size"])
        )
        comparison = compare_losses(run, self.runs / "reference", first_step=stopped_at)
        self.screen.event(
            "losses compared",
            f"{comparison.compared} steps after the resume, {len(comparison.differing)} differ from the reference",
            style="bold green" if comparison.is_equal else "bold red",
        )
        self.screen.timeline(bars_of(self.slurm.accounting(job_ids=self.job_ids)))
        steps = self.steps_of("train")
        images = [str(path) for path in (run / "samples.png", run / "loss.png") if path.exists()]
        return DemoReport(
            events=self.screen.events,
            preemptions=sum(attempt.reason is EndReason.PREEMPTED for attempt in attempts),
            requeues=self.job(job_id).restarts or 0,
            steps=len(steps),
            samples_seen=samples.seen,
            samples_repeated=samples.repeated,
            samples_missed=samples.missed,
            resumed_bit_equal=comparison.is_equal,
            steps_compared=comparison.compared,
            preempt_to_high_running_s=round(high_waited_s, 2),
            requeue_to_first_step_s=seconds_to_first_step(attempts, run, since=attempts[0].ended),
            nodes_free_to_first_step_s=seconds_to_first_step(attempts, run, since=self.nodes_free_at),
            first_loss=mean_loss(steps, last=False),
            last_loss=mean_loss(steps, last=True),
            images=images,
        )

    # ---- watching

    def submit(self, spec: JobSpec) -> str:
        """Submit a job and return its id."""
        job_id = str(self.launcher.submit(spec).job_id)
        self.job_ids.append(job_id)
        return job_id

    def job(self, job_id: str) -> Job:
        """Ask Slurm for a job."""
        return self.slurm.job(job_id)

    def steps_of(self, run: str) -> dict[int, Mapping[str, Any]]:
        """Return step -> metrics of a run, as far as it has come."""
        from jobs.demo_report import run_lineage

        return run_lineage(self.runs / run)

    def wait_for(self, job_id: str, spec: JobSpec, is_so: Callable[[], bool], what: Callable[[], str]) -> None:
        """Look until `is_so`, showing `what`.

        Raises:
            OutsideError: The job ended without it, or the stage's deadline passed.
        """
        deadline = time.monotonic() + _STAGE_S
        while not is_so():
            if self.job(job_id).is_ended and not is_so():
                self.require_success(job_id, spec)
                raise OutsideError(
                    f"job {job_id} ({spec.name}) ended before it came so far; {self.where_to_look(spec)}"
                )
            if time.monotonic() > deadline:
                raise OutsideError(
                    f"job {job_id} ({spec.name}): still waiting after {_STAGE_S:.0f} s; {self.where_to_look(spec)}"
                )
            self.screen.now(what())
            time.sleep(_POLL_S)

    def require_success(self, job_id: str, spec: JobSpec) -> None:
        """Raise OutsideError, with the place to look, unless the job completed."""
        job = self.job(job_id)
        if job.state != "COMPLETED":
            raise OutsideError(
                f"job {job_id} ({spec.name}) ended as {job.state}, exit code {job.exit_code}; {self.where_to_look(spec)}"
            )

    def where_to_look(self, spec: JobSpec) -> str:
        """Name the directory with the logs of a job."""
        return f"its logs are in {spec.run_directory}/slurm"


def _cluster_spec() -> ClusterSpec:
    from cluster.settings import ClusterSpec
    from cluster.yamlfile import parse_yaml, validate

    text = importlib.resources.files("templates").joinpath("cluster/local-demo.yaml").read_text(encoding="utf-8")
    return validate(ClusterSpec, parse_yaml(text, source="local-demo.yaml"))


def _definition(name: str, overrides: Sequence[str], **changes: Any) -> JobSpec:
    """Read one of the ready-made jobs, with some values changed."""
    from jobs.jobspec import read_job

    with importlib.resources.as_file(importlib.resources.files("jobs").joinpath(f"definitions/{name}.yaml")) as path:
        return read_job(path, overrides=overrides).model_copy(update=changes)


def _own_directory(directory: Path) -> Path:
    """Return the directory, empty, after removing what an earlier demo left in it.

    Raises:
        StateError: It holds something that no demo has put there.
    """
    directory = Path(os.path.abspath(directory))  # noqa: PTH100 - links in the user's path stay as they are written
    if directory.is_dir() and any(directory.iterdir()):
        if not (directory / MARKER).is_file():
            raise StateError(f"{directory}: holds files that no demo has put there; give another --directory")
        shutil.rmtree(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / MARKER).touch()
    except OSError as error:
        raise InputError(f"{directory}: cannot be written: {error.strerror}; give another --directory") from error
    return directory


def _print_summary(screen: Screen, report: DemoReport, directory: Path) -> None:
    def seconds(value: float | None) -> str:
        return "not measured" if value is None else f"{value:.1f} s"

    loss = (
        ""
        if report.first_loss is None or report.last_loss is None
        else f"{report.first_loss:.4f} -> {report.last_loss:.4f}"
    )
    equal = "equal to the bit" if report.resumed_bit_equal else "NOT equal"
    screen.table(
        [
            ("preempted, requeued", f"{report.preemptions} x, {report.requeues} x"),
            ("high job waited", seconds(report.preempt_to_high_running_s)),
            ("requeue to first step", seconds(report.requeue_to_first_step_s)),
            ("nodes free to first step", seconds(report.nodes_free_to_first_step_s)),
            ("losses after the resume", f"{equal} to an uninterrupted run, {report.steps_compared} steps compared"),
            (
                "samples",
                f"{report.samples_seen} seen, {report.samples_repeated} repeated, {report.samples_missed} missed",
            ),
            ("loss", loss),
            ("pictures", "  ".join(report.images)),
            ("report", str(directory / "report.json")),
        ]
    )
