"""Train an unconditional diffusion model: `python -m jobs.train --config run.yaml [--set key=value]`.

The file reads downwards: one attempt as a story, then the loop, saving, looking, and the end of the run. A run may take any
number of attempts; each goes on from the last committed checkpoint with the very samples, noise and timesteps that would have
come next (`jobs.order`, `jobs.randomness`), so nothing tells its losses from those of a run that was never stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from cluster.errors import InterruptedRunError, MusterError
from cluster.output import set_up_logging
from jobs.collectives import on_rank_0
from jobs.interruption import StopSignals
from jobs.journal import EndReason, RunDirectory
from jobs.process_group import RankInfo, close_process_group, read_rank_info
from jobs.requeue import CANCELLED_EXIT_CODE, Requeuer, quit_now
from jobs.settings import TrainConfig, dump_config, load_config

if TYPE_CHECKING:  # loaded in `train`, behind the signal handlers: torch takes seconds in which a stop may be asked for
    import numpy as np
    import numpy.typing as npt

    from jobs.batches import Batch
    from jobs.reporter import Reporter
    from jobs.training import Training

logger = logging.getLogger(__name__)


# ---- one attempt


def main(config: TrainConfig) -> int:
    """Train until the run is finished, or a stop is asked for, or it fails; at once if the run is finished already.

    Whatever the end, it is in the journal, and a job that is to come back is back in the queue.

    Returns:
        The exit code to leave with: 0 finished, 75 comes back (`jobs.requeue`), others as in `cluster.errors`.
    """
    with StopSignals() as stop:
        try:
            info = read_rank_info(os.environ)
        except MusterError as error:
            logger.error("%s", error)
            return error.exit_code
        run = RunDirectory(config.run_directory)
        if run.is_finished:
            logger.info("%s: this run is finished; nothing to do", config.run_directory)
            return 0
        requeuer = Requeuer(info, run, stop=stop, retries=config.retries)
        try:
            return run_attempt(config, info, run, requeuer, stop)
        except (
            InterruptedRunError
        ) as error:  # while the ranks were still gathering: nothing is done, nothing to agree on
            logger.info("rank %d: %s", info.rank, error)
            return requeuer.leave_early()
        except KeyboardInterrupt:
            run.end_attempt(EndReason.CANCELLED, None, message="interrupted from the keyboard")
            return CANCELLED_EXIT_CODE
        except Exception as error:  # of whatever kind: the journal and the other ranks must hear of it
            logger.error("rank %d: %s", info.rank, error, exc_info=not isinstance(error, MusterError))
            return requeuer.leave_after_crash(error)


def run_attempt(config: TrainConfig, info: RankInfo, run: RunDirectory, requeuer: Requeuer, stop: StopSignals) -> int:
    """Train from the last checkpoint on; returns the exit code."""
    from jobs.reporter import Reporter
    from jobs.training import resume, set_up

    training = set_up(config, info, stop)
    on_rank_0(training.ranks, lambda: run.lock(info, is_job_alive=requeuer.is_job_alive))
    try:
        said = resume(training)  # it clears up after dead saves: not before it is sure that they are dead
        attempt = begin_attempt(training, run, requeuer)
    except BaseException:
        run.release()
        raise
    with Reporter(training, attempt=attempt) as reporter:
        for sentence in said:
            reporter.say(sentence)
        run_steps(training, run, reporter)
        save(training, run, reporter)
        training.agreement.close()
        if training.step == config.last_step:
            try:
                finish(training, run, reporter)
            except InterruptedRunError as error:
                reporter.say(str(error))
            else:
                close_process_group()
                return 0
        reporter.say(f"stopping at step {training.step}")
        return requeuer.leave(training.step, ranks=training.ranks, committed_step=training.saved_step or 0)


def begin_attempt(training: Training, run: RunDirectory, requeuer: Requeuer) -> int:
    """Note in the journal that an attempt begins, and its configuration beside it; returns its number. A collective call.

    Raises:
        StateError: Another job works on this run, or it has given up.
    """

    def begin() -> int:
        record = run.begin_attempt(
            training.info,
            training.step,
            retries=training.config.retries,
            is_job_alive=requeuer.is_job_alive,
            explain=requeuer.explain,
        )
        assert record is not None  # it is, on rank 0
        beside = training.files.config.with_name(".config.yaml.new")
        beside.write_text(dump_config(training.config), encoding="utf-8")
        beside.replace(training.files.config)
        return record.number

    return on_rank_0(training.ranks, begin)


# ---- the loop


def run_steps(training: Training, run: RunDirectory, reporter: Reporter) -> None:
    """Train up to the last step, or until the ranks agree to stop."""
    from jobs.batches import KeyedBatches, make_loader

    config = training.config
    loader = iter(
        make_loader(
            KeyedBatches(training.pictures, config, training.share),
            config,
            first_step=training.step,
            last_step=config.last_step,
            pin_memory=training.accelerator.device.type == "cuda",
        )
    )
    training.model.train()
    while training.step < config.last_step:
        if training.agreement.agree(training.is_stop_requested):
            return
        train_one_step(training, loader, reporter)
        run.note_step(training.step)
        if training.step == config.last_step:
            return
        if training.step % config.checkpoint.every_steps == 0:
            save(training, run, reporter, may_fail=True)
        if config.evaluation.every_steps and training.step % config.evaluation.every_steps == 0:
            evaluate(training, reporter)
        if config.sampling.every_steps and training.step % config.sampling.every_steps == 0:
            show_samples(training, reporter)


def train_one_step(training: Training, loader: Iterator[Batch], reporter: Reporter) -> None:
    """Make one step of the optimizer, of one or several micro-steps."""
    import torch

    from jobs.schedule import learning_rate

    config, accelerator = training.config, training.accelerator
    batches = []
    total = torch.zeros((), device=accelerator.device)
    for micro_step in range(config.gradient_accumulation):
        batch = next(loader).to(accelerator.device)
        batches.append(batch)
        last = micro_step == config.gradient_accumulation - 1
        with contextlib.nullcontext() if last else accelerator.no_sync(training.model):  # gradients travel once a step
            loss = training.objective.loss(training.model, batch.images, batch.noise, batch.timesteps)
            accelerator.backward(loss / config.gradient_accumulation)
        total += loss.detach() / config.gradient_accumulation
    parameters = list(training.bare_model.parameters())
    grad_norm = torch.nn.utils.clip_grad_norm_(parameters, config.optimizer.clip_norm or float("inf"), foreach=True)
    rate = learning_rate(config, training.step)
    for group in training.optimizer.param_groups:
        group["lr"] = rate
    training.optimizer.step()
    training.optimizer.zero_grad()
    training.ema.update(training.step + 1)
    reporter.step_done(batches, loss=total, grad_norm=grad_norm, learning_rate=rate)
    training.step += 1


# ---- saving


def save(training: Training, run: RunDirectory, reporter: Reporter, *, may_fail: bool = False) -> None:
    """Commit a checkpoint of this step, unless it is there already; a collective call.

    Args:
        training: What to save.
        run: Its journal.
        reporter: Told about it.
        may_fail: Go on with a warning if it cannot be written (a full disk): an earlier checkpoint is still there.

    Raises:
        SaveError: It cannot be written; on every rank alike.
    """
    from jobs.checkpoint import SaveError

    reporter.flush()
    if training.step == (training.saved_step or 0):
        return
    try:
        path = training.checkpointer.save(training.state()).commit()
    except SaveError as error:
        if not may_fail:
            raise
        if training.is_first:
            logger.warning(
                "%s. Training goes on; the next attempt to save is in %d steps",
                error,
                training.config.checkpoint.every_steps,
            )
    else:
        training.saved_step = training.step
        run.note_commit(training.step)
        reporter.say(f"saved {path.name}")
    reporter.restart_clock()


# ---- looking


def evaluate(training: Training, reporter: Reporter) -> None:
    """Measure the loss of the averaged weights on fixed samples, unless a stop is agreed meanwhile. A collective call."""
    import torch

    from jobs.batches import KeyedBatches

    config, device = training.config, training.accelerator.device
    batches = KeyedBatches(training.pictures, config, training.share, evaluation=True)
    total = torch.zeros((), device=device)
    count = config.evaluation.batches * config.gradient_accumulation
    training.bare_model.eval()
    try:
        with torch.no_grad(), training.accelerator.autocast(), training.ema.in_place_of(training.bare_model):
            for number in range(count):
                if training.agreement.agree_now(training.is_stop_requested):
                    return
                batch = batches[divmod(number, config.gradient_accumulation)].to(device)
                total += (
                    training.objective.loss(training.bare_model, batch.images, batch.noise, batch.timesteps) / count
                )
    finally:
        training.bare_model.train()
    loss = sum(training.ranks.gather(total.item())) / training.info.world_size
    reporter.say(f"step {training.step}: evaluation loss {loss:.4f}")
    reporter.trackers.log({"evaluation_loss": loss}, training.step)
    reporter.restart_clock()


def show_samples(training: Training, reporter: Reporter) -> None:
    """Draw a grid of pictures for the trackers, unless a rank is asked to stop meanwhile. A collective call."""
    try:
        grid = draw_grid(training)
    except InterruptedRunError as error:
        reporter.say(str(error))
        return
    reporter.trackers.log_picture("samples", grid, training.step)
    reporter.restart_clock()


def draw_grid(training: Training) -> npt.NDArray[np.uint8]:
    """Draw the configured number of pictures with the averaged weights, every rank its share. A collective call.

    Raises:
        InterruptedRunError: A rank is asked to stop; on every rank alike.
    """
    import numpy as np

    from jobs.sample import draw_samples, make_grid

    settings, world_size = training.config.sampling, training.info.world_size
    height, width = training.picture_size
    share: npt.NDArray[np.uint8] | None = None
    with contextlib.suppress(InterruptedRunError), training.ema.in_place_of(training.bare_model):
        share = draw_samples(
            training.bare_model,
            training.config,
            numbers=range(training.info.rank, settings.count, world_size),
            height=height,
            width=width,
            sampler=settings.sampler,
            inference_steps=settings.inference_steps,
            seed=settings.seed,
            should_stop=lambda: training.is_stop_requested,
        )
    pictures = np.empty((settings.count, height, width, 3), dtype=np.uint8)
    for rank, part in enumerate(training.ranks.gather(share)):
        if part is None:
            raise InterruptedRunError("asked to stop while pictures were drawn; they are left undone")
        pictures[rank::world_size] = part
    return make_grid(pictures)


# ---- the end of the run


def finish(training: Training, run: RunDirectory, reporter: Reporter) -> None:
    """Leave pictures, the loss curve and the model behind, and mark the run as finished. A collective call.

    Raises:
        InterruptedRunError: A rank is asked to stop meanwhile. The next attempt has only this left to do.
    """
    from jobs.loss_curve import draw_loss_curve
    from jobs.sample import save_picture

    grid = draw_grid(training)

    def leave_results() -> None:
        reporter.trackers.log_picture("samples", grid, training.step)
        save_picture(grid, training.files.pictures)
        draw_loss_curve(training.files.metrics, training.files.loss_curve)
        export_model(training)
        run.mark_finished(training.step)
        reporter.say(f"finished: {training.files.pictures}, {training.files.loss_curve}, {training.files.model}")

    on_rank_0(training.ranks, leave_results)


def export_model(training: Training) -> None:
    """Write the averaged weights as diffusers reads them, beside and then renamed."""
    beside = training.files.model.with_name(".model.new")
    shutil.rmtree(beside, ignore_errors=True)
    with training.ema.in_place_of(training.bare_model):
        cast(Any, training.bare_model).save_pretrained(beside)
    shutil.rmtree(training.files.model, ignore_errors=True)
    beside.rename(training.files.model)


# ---- the command line


def run_command_line(argv: Sequence[str] | None = None) -> int:
    """Read the arguments, and train; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m jobs.train", description="Train an unconditional diffusion model.")
    parser.add_argument(
        "--config", type=Path, required=True, help="YAML file: a TrainConfig, or a job with one under `config`"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help="change a value"
    )
    options = parser.parse_args(argv)
    set_up_logging(1)
    try:
        return main(load_config(options.config, options.overrides))
    except MusterError as error:
        logger.error("%s", error)
        return error.exit_code


if __name__ == "__main__":
    if exit_code := run_command_line():
        quit_now(exit_code)
