"""The trainer as a whole: real processes, real gloo groups, real signals, a small UNet on small pictures."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from jobs import train as train_module
from jobs.checkpoint import Checkpointer, SaveError, checkpoint_path, list_steps, load_part
from jobs.journal import EndReason, RunDirectory
from jobs.records import SampleCount, count_samples, lineage, read_json_lines
from jobs.reporter import Reporter
from jobs.sample import load_trained
from jobs.sample import main as sample_main
from jobs.settings import TrainConfig, dump_config
from jobs.shards import new_shard, shard_name

pytestmark = [
    pytest.mark.training,
    pytest.mark.timeout(900),
]  # attempts of two ranks, one after another, on a busy machine

PICTURES = 22
KEYS = [f"p{number:02d}" for number in range(PICTURES)]
STEPS = 12
BATCH = 8

DRIVER = '''
"""Run the trainer with a fault at a chosen place: FAULT=<rank>:<step>:<signal> after that step, or in the commit of that step."""
import os, signal, sys, threading
from pathlib import Path
from jobs import checkpoint, train
from jobs.reporter import Reporter

rank, step, name = os.environ.get("FAULT", "-1:-1:SIGKILL").split(":")
mine = rank == os.environ.get("RANK", "0")
real_step_done, real_write = Reporter.step_done, checkpoint._write_bytes

def step_done(self, *args, **kwargs):
    real_step_done(self, *args, **kwargs)
    if mine and self._training.step == int(step) and "commit" not in os.environ:
        os.kill(os.getpid(), getattr(signal, name))

def write_bytes(path, data):
    if mine and f"step-{int(step):08d}" in str(path):
        os.kill(os.getpid(), signal.SIGKILL)
    real_write(path, data)

if os.environ.get("FAULT_IN") == "commit":
    checkpoint._write_bytes = write_bytes
else:
    Reporter.step_done = step_done
sys.exit(train.run_command_line(sys.argv[1:]))
'''


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards of small pictures: one colour each, with a little noise."""
    directory = tmp_path_factory.mktemp("train-shards")
    random = np.random.default_rng(0)
    for number, keys in enumerate((KEYS[:12], KEYS[12:])):
        with new_shard(directory / shard_name(number)) as writer:
            for key in keys:
                pixels = np.clip(random.integers(0, 256, 3) + random.integers(-20, 20, (8, 8, 3)), 0, 255).astype(
                    np.uint8
                )
                buffer = io.BytesIO()
                Image.fromarray(pixels).save(buffer, "PNG")
                writer.add(key, image=buffer.getvalue(), extension="png", caption=key)
    return directory


def make_config(run: Path, shards: Path, **changes: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "run_directory": run,
        "data": {"directory": shards, "horizontal_flip": 0.5},
        "steps": STEPS,
        "batch_size": BATCH,
        "threads": 1,
        "model": {
            "channels": [8, 16],
            "layers_per_block": 1,
            "norm_groups": 4,
            "attention_head_channels": 8,
            "dropout": 0.1,
        },
        "schedule": {"warmup_steps": 3},
        "checkpoint": {"every_steps": 5, "keep": 10},
        "sampling": {"count": 2, "inference_steps": 2},
        "trackers": [],
        "record_samples": True,
    }
    for key, value in changes.items():
        values[key] = {**values[key], **value} if isinstance(values.get(key), dict) else value
    return TrainConfig.model_validate(values)


@pytest.fixture
def in_process() -> Iterator[Any]:
    """Run the trainer in this process, on one rank; returns its exit code."""
    from accelerate.state import AcceleratorState

    def run(config: TrainConfig) -> int:
        AcceleratorState._reset_state(reset_partial_state=True)
        with warnings.catch_warnings():
            warnings.simplefilter("default")  # other people's code may warn; ours is watched everywhere else
            return train_module.main(config)

    threads = torch.get_num_threads()
    yield run
    torch.set_num_threads(threads)
    AcceleratorState._reset_state(reset_partial_state=True)


def stop_after(monkeypatch: pytest.MonkeyPatch, *steps: int, number: int = signal.SIGTERM) -> None:
    """Send this process a signal after each of these steps, once each."""
    left = set(steps)
    real = Reporter.step_done

    def step_done(self: Any, *arguments: Any, **keywords: Any) -> None:
        real(self, *arguments, **keywords)
        if self._training.step in left:
            left.remove(self._training.step)
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Reporter, "step_done", step_done)


def launch(directory: Path, config: TrainConfig, *, ranks: int, **environment: str) -> list[int]:
    """Run the trainer as `ranks` processes, as srun would start them; returns their exit codes."""
    directory.mkdir(parents=True, exist_ok=True)
    driver, file = directory / "driver.py", directory / "config.yaml"
    driver.write_text(DRIVER)
    file.write_text(dump_config(config))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with contextlib.ExitStack() as logs:
        processes = [
            subprocess.Popen(
                [sys.executable, str(driver), "--config", str(file)],
                env={
                    **os.environ,
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(ranks),
                    "LOCAL_WORLD_SIZE": str(ranks),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                    "CUDA_VISIBLE_DEVICES": "",
                    "PYTHONPATH": str(Path(__file__).parents[2]),
                    **environment,
                },
                stdout=logs.enter_context((directory / f"rank{rank}.log").open("ab")),
                stderr=subprocess.STDOUT,
            )
            for rank in range(ranks)
        ]
    try:
        return [process.wait(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()


def losses(run: Path) -> list[str]:
    """The loss of every step that counts, as hexadecimal, in order; a hole would shift them."""
    steps = lineage(read_json_lines(run / "metrics.jsonl"))
    assert list(steps) == list(range(len(steps)))
    assert all(len(parts) == 1 for parts in steps.values())
    return [parts[0]["loss_hex"] for parts in steps.values()]


def weights(run: Path, part: str = "model", step: int = STEPS) -> Mapping[str, torch.Tensor]:
    return load_part(checkpoint_path(run / "checkpoints", step), part)  # type: ignore[no-any-return]


def same(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    return set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)


def samples(run: Path) -> list[dict[str, Any]]:
    return list(
        itertools.chain.from_iterable(read_json_lines(path) for path in sorted(run.glob("samples-rank*.jsonl")))
    )


def stream(run: Path) -> dict[int, dict[int, str]]:
    """Step -> place in the global batch -> key, over all ranks, of the steps that count."""
    return {
        step: {place: key for part in parts for place, key in zip(part["positions"], part["keys"], strict=True)}
        for step, parts in lineage(samples(run)).items()
    }


@pytest.fixture(scope="session")
def straight(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    """A run of one rank that was never stopped, in a process of its own."""
    run = tmp_path_factory.mktemp("straight") / "run"
    assert launch(run.parent, make_config(run, shards), ranks=1) == [0]
    return run


@pytest.fixture(scope="session")
def straight_on_two(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    """A run of two ranks that was never stopped."""
    run = tmp_path_factory.mktemp("straight2") / "run"
    assert launch(run.parent, make_config(run, shards), ranks=2) == [0, 0]
    return run


def test_a_run_leaves_everything_behind(straight: Path) -> None:
    """Metrics of every step, a journal that says finished, pictures, the curve, and a model that diffusers reads."""
    assert len(losses(straight)) == STEPS
    record = next(read_json_lines(straight / "metrics.jsonl"))
    assert {"attempt", "step", "loss", "loss_hex", "lr", "grad_norm", "samples_seen", "samples_per_s"} <= set(record)
    assert float.fromhex(record["loss_hex"]) == record["loss"]
    journal = RunDirectory(straight)
    assert journal.is_finished
    assert [attempt.reason for attempt in journal.attempts()] == [EndReason.FINISHED]
    for name in ("samples.png", "loss.png"):
        with Image.open(straight / name) as picture:
            assert picture.size[0] >= 400
    from diffusers.models.unets.unet_2d import UNet2DModel

    model = UNet2DModel.from_pretrained(straight / "model")
    assert same(dict(model.named_parameters()), weights(straight, "ema"))


def test_every_sample_comes_once_an_epoch(straight: Path) -> None:
    """What was really decoded, over more than four epochs of 22 pictures, repeats and misses nothing."""
    assert count_samples(samples(straight), keys=KEYS, batch_size=BATCH) == SampleCount(STEPS, STEPS * BATCH, 0, 0)


def test_a_second_start_of_a_finished_run_does_nothing(straight: Path, shards: Path, in_process: Any) -> None:
    """A requeue that comes too late is harmless."""
    before = (straight / "metrics.jsonl").read_bytes()
    assert in_process(make_config(straight, shards)) == 0
    assert (straight / "metrics.jsonl").read_bytes() == before


def test_many_stops_on_one_rank_change_no_bit(
    tmp_path: Path, shards: Path, straight: Path, in_process: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped before, at and after saves and epoch ends, with TERM and USR2: losses, weights, averages and samples are the same.

    With dropout, whose random state must be taken over; and in another process than the uninterrupted run.
    """
    config = make_config(tmp_path / "run", shards)
    stop_after(monkeypatch, 0, 4, 5, 10, number=signal.SIGTERM)
    codes = [in_process(config) for _ in range(4)]
    stop_after(monkeypatch, 7, number=signal.SIGUSR2)
    codes += [in_process(config)]
    assert codes == [75, 75, 75, 75, 0]
    assert losses(config.run_directory) == losses(straight)
    for part in ("model", "ema"):
        assert same(weights(config.run_directory, part), weights(straight, part))
    assert count_samples(samples(config.run_directory), keys=KEYS, batch_size=BATCH) == SampleCount(
        STEPS, STEPS * BATCH, 0, 0
    )


def test_work_lost_without_warning_is_done_again_to_the_bit(tmp_path: Path, shards: Path, straight: Path) -> None:
    """Killed by SIGKILL after step 7: the next attempt starts from the save at 5, with data workers this time, as if never killed."""
    run = tmp_path / "run"
    assert launch(tmp_path, make_config(run, shards), ranks=1, FAULT="0:7:SIGKILL") == [-signal.SIGKILL]
    assert launch(tmp_path, make_config(run, shards, data={"workers": 2}), ranks=1) == [0]
    attempts = [record["attempt"] for record in read_json_lines(run / "metrics.jsonl")]
    assert (attempts.count(1), attempts.count(2)) == (7, STEPS - 5)
    assert losses(run) == losses(straight)
    assert same(weights(run), weights(straight))
    assert count_samples(samples(run), keys=KEYS, batch_size=BATCH) == SampleCount(STEPS, STEPS * BATCH, 0, 0)


def test_a_kill_in_the_middle_of_a_save_costs_that_save(tmp_path: Path, shards: Path, straight: Path) -> None:
    """Killed between the files and the rename of step 10: no half checkpoint is believed, its remains are removed."""
    run = tmp_path / "run"
    assert launch(tmp_path, make_config(run, shards), ranks=1, FAULT="0:10:SIGKILL", FAULT_IN="commit") == [
        -signal.SIGKILL
    ]
    assert list_steps(run / "checkpoints") == [5]
    assert any(path.name.startswith(".step-00000010.tmp-") for path in (run / "checkpoints").iterdir())
    assert launch(tmp_path, make_config(run, shards), ranks=1) == [0]
    assert not any(path.name.startswith(".") for path in (run / "checkpoints").iterdir())
    assert losses(run) == losses(straight)


def test_two_ranks_stop_together_and_go_on_to_the_bit(tmp_path: Path, shards: Path, straight_on_two: Path) -> None:
    """Only rank 1 is signalled, both leave with 75 at the same step; then rank 0 is killed; then the run finishes."""
    run = tmp_path / "run"
    config = make_config(run, shards)
    assert launch(tmp_path, config, ranks=2, FAULT="1:3:SIGTERM") == [75, 75]
    assert list_steps(run / "checkpoints")[0] in (4, 5)
    killed = launch(tmp_path, config, ranks=2, FAULT="0:8:SIGKILL")
    assert killed[0] == -signal.SIGKILL
    assert killed[1] not in (0, -signal.SIGKILL)
    assert launch(tmp_path, config, ranks=2) == [0, 0]
    assert losses(run) == losses(straight_on_two)
    assert same(weights(run), weights(straight_on_two))
    assert stream(run) == stream(straight_on_two)
    assert count_samples(samples(run), keys=KEYS, batch_size=BATCH) == SampleCount(STEPS, STEPS * BATCH, 0, 0)
    assert [attempt.reason for attempt in RunDirectory(run).attempts()][0::2] == [
        EndReason.SIGNALLED,
        EndReason.FINISHED,
    ]


def test_the_stream_of_samples_does_not_depend_on_ranks(straight: Path, straight_on_two: Path) -> None:
    """One rank and two train on the same pictures in the same places of the same steps, with nearly the same losses."""
    assert stream(straight) == stream(straight_on_two)


def test_another_number_of_ranks_goes_on_with_the_same_stream(
    tmp_path: Path, shards: Path, straight: Path, in_process: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Begun on one rank with dropout off, continued on two: the samples are the same, losses agree but for their last bits."""
    calm = {"dropout": 0.0}
    whole = make_config(tmp_path / "whole", shards, model=calm)
    assert in_process(whole) == 0
    config = make_config(tmp_path / "run", shards, model=calm, gradient_accumulation=1)
    stop_after(monkeypatch, 5)
    assert in_process(config) == 75
    assert launch(tmp_path, config, ranks=2) == [0, 0]
    assert stream(config.run_directory) == stream(whole.run_directory) == stream(straight)
    ours, theirs = (np.array([float.fromhex(text) for text in losses(c.run_directory)]) for c in (config, whole))
    assert np.allclose(ours, theirs, rtol=1e-3)


def test_four_ranks_resume_to_the_bit(tmp_path: Path, shards: Path) -> None:
    """With more than two ranks the layout of DDP's buckets decides in which order gradients are added; a resume keeps it."""
    wide = {
        "channels": [32, 96],
        "norm_groups": 8,
        "dropout": 0.0,
    }  # more than a megabyte of gradients: several buckets
    config = make_config(tmp_path / "whole", shards, model=wide, steps=4, checkpoint={"every_steps": 2})
    assert launch(tmp_path / "a", config, ranks=4) == [0] * 4
    stopped = config.model_copy(update={"run_directory": tmp_path / "run"})
    assert launch(tmp_path / "b", stopped, ranks=4, FAULT="2:0:SIGUSR2") == [75] * 4
    assert launch(tmp_path / "b", stopped, ranks=4) == [0] * 4
    assert losses(stopped.run_directory) == losses(config.run_directory)
    assert same(weights(stopped.run_directory, step=4), weights(config.run_directory, step=4))


def test_accumulated_micro_steps_are_the_same_step(tmp_path: Path, shards: Path, in_process: Any) -> None:
    """Four micro-steps of two samples give the loss of one step of eight, but for rounding, with the same samples."""
    runs = []
    for accumulation in (1, 4):
        config = make_config(
            tmp_path / str(accumulation), shards, gradient_accumulation=accumulation, steps=4, model={"dropout": 0.0}
        )
        assert in_process(config) == 0
        runs.append(config.run_directory)
    one, four = ([float.fromhex(text) for text in losses(run)] for run in runs)
    assert np.allclose(one, four, rtol=1e-3)
    assert stream(runs[0]) == stream(runs[1])


def test_a_full_disk_does_not_stop_training(
    tmp_path: Path,
    shards: Path,
    straight: Path,
    in_process: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A periodic save that fails is a warning and training goes on as before."""
    real = Checkpointer.save

    def save(self: Checkpointer, state: Any) -> Any:
        if state.step == 5:
            raise SaveError("the checkpoint could not be written: No space left on device")
        return real(self, state)

    monkeypatch.setattr(Checkpointer, "save", save)
    config = make_config(tmp_path / "run", shards)
    assert in_process(config) == 0
    assert "No space left on device" in caplog.text
    assert "Training goes on" in caplog.text
    assert list_steps(config.run_directory / "checkpoints") == [12, 10]
    assert losses(config.run_directory) == losses(straight)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MB, where this may be mounted."""
    place = tmp_path / "small"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no right to mount a small file system")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_is_full_for_a_while_costs_no_line(
    small_disk: Path, shards: Path, straight: Path, in_process: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Really full from step 6 to step 11: metrics and sample records wait, and all are there in the end, losses as ever."""
    config = make_config(small_disk / "run", shards, checkpoint={"every_steps": 100}, record_samples=True)
    ballast = small_disk / "ballast"
    real = Reporter.step_done

    def step_done(self: Any, *arguments: Any, **keywords: Any) -> None:
        if self._training.step == 6:
            with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
                while True:
                    file.write(bytes(4096))
            with metrics.open("ab", buffering=0) as file, contextlib.suppress(OSError):
                while True:
                    file.write(b"\n")  # to the last byte of its last page
        if self._training.step == 11:
            ballast.unlink()
        real(self, *arguments, **keywords)

    metrics = config.run_directory / "metrics.jsonl"
    monkeypatch.setattr(Reporter, "step_done", step_done)
    assert in_process(config) == 0
    assert losses(config.run_directory) == losses(straight)
    assert count_samples(samples(config.run_directory), keys=KEYS, batch_size=BATCH) == SampleCount(
        STEPS, STEPS * BATCH, 0, 0
    )


def test_the_last_save_must_succeed(
    tmp_path: Path, shards: Path, in_process: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run whose end cannot be saved has failed: it says so and is not marked as finished."""

    def save(self: Checkpointer, state: Any) -> Any:
        raise SaveError("the checkpoint could not be written: No space left on device")

    monkeypatch.setattr(Checkpointer, "save", save)
    config = make_config(tmp_path / "run", shards, steps=3)
    assert in_process(config) == SaveError.exit_code
    journal = RunDirectory(config.run_directory)
    assert not journal.is_finished
    assert "No space left on device" in journal.attempts()[-1].message


def test_a_truncated_checkpoint_is_passed_over(
    tmp_path: Path,
    shards: Path,
    straight: Path,
    in_process: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """With the newest checkpoint cut off, the run goes on from the one before, names the damage, and ends the same to the bit."""
    config = make_config(tmp_path / "run", shards)
    stop_after(monkeypatch, 7)
    assert in_process(config) == 75
    newest = checkpoint_path(config.run_directory / "checkpoints", 8) / "optimizer.pt"
    os.truncate(newest, newest.stat().st_size // 2)
    assert in_process(config) == 0
    assert "optimizer.pt has" in caplog.text
    assert losses(config.run_directory) == losses(straight)


def test_a_stop_while_the_last_pictures_are_drawn_leaves_only_them_to_do(
    tmp_path: Path, shards: Path, straight: Path, in_process: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked to stop after the last step, it comes back, trains nothing more, and finishes."""
    config = make_config(tmp_path / "run", shards)
    stop_after(monkeypatch, STEPS - 1)
    assert in_process(config) == 75
    assert not RunDirectory(config.run_directory).is_finished
    assert in_process(config) == 0
    assert {record["attempt"] for record in read_json_lines(config.run_directory / "metrics.jsonl")} == {1}
    assert (config.run_directory / "samples.png").read_bytes() == (straight / "samples.png").read_bytes()


def test_a_stop_during_evaluation_is_heard(
    tmp_path: Path, shards: Path, in_process: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A long evaluation is left at its next batch, and the run is saved and leaves."""
    from jobs.batches import KeyedBatches

    made = 0
    real = KeyedBatches.__getitem__

    def getitem(self: KeyedBatches, where: tuple[int, int]) -> Any:
        nonlocal made
        if self._evaluation:
            made += 1
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, where)

    monkeypatch.setattr(KeyedBatches, "__getitem__", getitem)
    config = make_config(tmp_path / "run", shards, evaluation={"every_steps": 2, "batches": 50})
    assert in_process(config) == 75
    assert made == 1
    assert list_steps(config.run_directory / "checkpoints") == [2]


def test_evaluation_and_pictures_leave_training_as_it_is(
    tmp_path: Path, shards: Path, straight: Path, in_process: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Looking at a run does not change it: the same losses with evaluation, grids and TensorBoard on."""
    config = make_config(
        tmp_path / "run",
        shards,
        evaluation={"every_steps": 3, "batches": 2},
        sampling={"every_steps": 4},
        trackers=["tensorboard"],
    )
    assert in_process(config) == 0
    assert losses(config.run_directory) == losses(straight)
    assert "evaluation loss" in capsys.readouterr().out
    assert list((config.run_directory / "logs").rglob("events.out.tfevents.*"))


def test_a_second_start_leaves_the_save_under_way_alone(
    tmp_path: Path, shards: Path, in_process: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Refused before anything is cleared up: what looks like the remains of a dead save may be the live job's, being written."""
    config = make_config(tmp_path / "run", shards)
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import os, sys; from pathlib import Path; from jobs.journal import RunDirectory\n"
            "from jobs.process_group import read_rank_info\n"
            f"RunDirectory(Path({str(config.run_directory)!r})).begin_attempt(read_rank_info(os.environ), 0)\n"
            "print('begun', flush=True); sys.stdin.read()",
        ],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "begun\n"
        under_way = config.run_directory / "checkpoints" / ".step-00000005.tmp-0123abcd"
        under_way.mkdir(parents=True)
        (under_way / "model.pt").write_bytes(b"half")
        assert in_process(config) == 9
        assert (under_way / "model.pt").exists()
        assert "works on this run" in caplog.text
        holder.kill()
    assert in_process(config) == 0  # the dead job's remains are cleared up
    assert not under_way.exists()


def test_a_refused_resume_gives_the_lock_back(
    tmp_path: Path, shards: Path, in_process: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A start that fails between lock and attempt (here: other settings) leaves no lock behind, also within one process."""
    config = make_config(tmp_path / "run", shards)
    stop_after(monkeypatch, 2)
    assert in_process(config) == 75
    assert in_process(make_config(tmp_path / "run", shards, optimizer={"learning_rate": 1e-5})) == 3
    assert not (config.run_directory / "lock.json").exists()


def test_other_settings_are_refused_on_resume(
    tmp_path: Path, shards: Path, in_process: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A changed learning rate is named with both values; more steps are fine."""
    config = make_config(tmp_path / "run", shards)
    stop_after(monkeypatch, 2)
    assert in_process(config) == 75
    assert in_process(make_config(tmp_path / "run", shards, optimizer={"learning_rate": 1e-5})) == 3
    assert "optimizer.learning_rate: 0.0003 in the run, 1.0e-05 now" in caplog.text
    assert in_process(make_config(tmp_path / "run", shards, steps=14, steps_to_run=6)) == 0


def test_other_pictures_are_refused_on_resume(
    tmp_path: Path, shards: Path, in_process: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Shards that hold something else would silently change what is trained on."""
    config = make_config(tmp_path / "run", shards)
    stop_after(monkeypatch, 2)
    assert in_process(config) == 75
    other = tmp_path / "other"
    other.mkdir()
    with new_shard(other / shard_name(0)) as writer:
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8)).save(buffer, "PNG")
        writer.add("a", image=buffer.getvalue(), extension="png", caption="")
    assert in_process(make_config(tmp_path / "run", other)) == 3
    assert "other pictures" in caplog.text


def test_a_loss_that_is_no_number_ends_the_run_unsaved(tmp_path: Path, shards: Path, in_process: Any) -> None:
    """A run that diverged stops at once with what to do, and no checkpoint holds the ruined weights."""
    config = make_config(
        tmp_path / "run", shards, optimizer={"learning_rate": 1e30, "clip_norm": 0}, checkpoint={"every_steps": 1}
    )
    assert in_process(config) == 9
    message = RunDirectory(config.run_directory).attempts()[-1].message
    assert "learning_rate" in message
    for step in list_steps(config.run_directory / "checkpoints"):
        assert (
            all(torch.isfinite(value).all() for value in weights(config.run_directory, step=step).values()) or step == 1
        )


def test_other_precisions_and_objectives_train(tmp_path: Path, shards: Path, in_process: Any) -> None:
    """bf16, epsilon and deterministic algorithms together: finite losses close to those of fp32."""
    same_otherwise = {"steps": 3, "objective": {"prediction": "epsilon"}, "model": {"dropout": 0.0}}
    plain = make_config(tmp_path / "fp32", shards, **same_otherwise)
    config = make_config(tmp_path / "bf16", shards, precision="bf16", deterministic=True, **same_otherwise)
    try:
        assert in_process(plain) == 0
        assert in_process(config) == 0
    finally:
        torch.use_deterministic_algorithms(False)
    ours, theirs = (np.array([float.fromhex(text) for text in losses(c.run_directory)]) for c in (config, plain))
    assert np.allclose(ours, theirs, rtol=0.05)
    assert not np.array_equal(ours, theirs)


def test_steps_to_run_is_the_beginning_of_the_whole(
    tmp_path: Path, shards: Path, straight: Path, in_process: Any
) -> None:
    """A run cut short by steps_to_run has the losses of the whole one, rates and all."""
    config = make_config(tmp_path / "run", shards, steps_to_run=4)
    assert in_process(config) == 0
    assert losses(config.run_directory) == losses(straight)[:4]


def test_a_batch_that_cannot_be_divided_is_refused_before_anything_is_waited_for(
    tmp_path: Path, shards: Path, in_process: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """The message has the values that would do."""
    assert in_process(make_config(tmp_path / "run", shards, gradient_accumulation=3)) == 3
    assert "batch_size (8)" in caplog.text


def test_pictures_can_be_drawn_from_a_run(straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`python -m jobs.sample` draws from the newest sound checkpoint, or the one asked for, and says which."""
    assert (
        sample_main(
            ["--run", str(straight), "--count", "3", "--inference-steps", "2", "--out", str(tmp_path / "a.png")]
        )
        == 0
    )
    assert "3 pictures from step 12" in capsys.readouterr().out
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size[0] >= 512
    assert load_trained(straight, step=5)[3] == 5
    assert sample_main(["--run", str(straight), "--step", "6"]) == 7
    assert "it has 12, 10, 5" in capsys.readouterr().err


def test_the_command_line_reports_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A wrong file ends with exit code 3 and says where."""
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps({"run_directory": "x", "data": {"directory": "y"}, "batchsize": 3}))
    assert train_module.run_command_line(["--config", str(file)]) == 3
    assert "batch_size" in capsys.readouterr().err
