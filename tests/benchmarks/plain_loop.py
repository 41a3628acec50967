"""The training loop that people start from, to compare with: diffusers' unconditional example in its plainest form.

It does what `examples/unconditional_image_generation/train_unconditional.py` of diffusers does, in the same order and with the
same calls to accelerate, and with that script's defaults: a prepared, shuffling DataLoader, AdamW, a learning rate schedule,
clipping, EMAModel, a tracker, `save_state` every so many steps, and on resume `load_state` and leaving out the first batches of
an epoch. Left out, all in its favour: the `datasets` library and torchvision (pictures are read by Pillow here), the progress
bar, and deleting old checkpoints. Added: a line of JSON a step, so that others can see how far it is and what it has read.

    python -m tests.benchmarks.plain_loop '{"pictures": ..., "output": ..., ...}'
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from accelerate.utils import ProjectConfiguration
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from PIL import Image


@dataclass(frozen=True, kw_only=True)
class PlainSettings:
    """What the loop is run with. The learning rate and the like are the example's own defaults."""

    pictures: Path
    """Folder of PNG files of one size."""
    output: Path
    steps: int
    batch_size: int
    channels: tuple[int, ...]
    layers_per_block: int
    attention: tuple[bool, ...]
    attention_head_channels: int
    norm_groups: int
    precision: str = "no"
    checkpoint_every: int = 1_000_000
    threads: int = 0
    """Threads for CPU work; torch's own choice by default."""
    seed: int = 0
    attempt: int = 1
    resume: bool = False
    """Go on from the newest checkpoint in `output`."""
    record: bool = False
    """Write `metrics.jsonl` and `samples.jsonl`."""
    save_pipeline: bool = False
    """Leave a pipeline behind at the end."""


class PictureFolder(torch.utils.data.Dataset[dict[str, Any]]):
    """Pictures as the example's transforms make them: RGB, float32 in [-1, 1], channels first."""

    def __init__(self, folder: Path) -> None:
        self._paths = sorted(folder.glob("*.png"))

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, number: int) -> dict[str, Any]:
        with Image.open(self._paths[number]) as file:
            pixels = np.array(file.convert("RGB"))
        picture = torch.from_numpy(pixels).permute(2, 0, 1).contiguous().to(torch.float32).div(255)
        return {"input": picture.sub_(0.5).div_(0.5), "key": self._paths[number].stem}


def train(settings: PlainSettings) -> Iterator[int]:
    """Train, yielding the number of steps done after each one."""
    accelerator = accelerate.Accelerator(
        mixed_precision=settings.precision,
        cpu=not torch.cuda.is_available(),
        log_with="tensorboard",
        project_config=ProjectConfiguration(
            project_dir=str(settings.output), logging_dir=str(settings.output / "logs")
        ),
    )
    accelerate.utils.set_seed(settings.seed)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    dataset = PictureFolder(settings.pictures)
    model = _model(settings, size_px=dataset[0]["input"].shape[-1])
    average = EMAModel(
        model.parameters(), decay=0.9999, use_ema_warmup=True, model_cls=UNet2DModel, model_config=model.config
    )
    accelerator.register_for_checkpointing(average)
    make_scheduler: Any = DDPMScheduler
    noise_scheduler = make_scheduler(num_train_timesteps=1000, beta_schedule="linear", prediction_type="epsilon")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8)
    loader = torch.utils.data.DataLoader(dataset, batch_size=settings.batch_size, shuffle=True, num_workers=0)
    schedule = get_scheduler("cosine", optimizer=optimizer, num_warmup_steps=500, num_training_steps=settings.steps)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    average.to(accelerator.device)
    accelerator.init_trackers("train_unconditional")

    steps_per_epoch = len(loader)
    done = _load_newest(accelerator, settings.output) if settings.resume else 0
    first_epoch, to_leave_out = divmod(done, steps_per_epoch)
    recorder = _Recorder(settings) if settings.record else None
    for epoch in range(first_epoch, math.ceil(settings.steps / steps_per_epoch)):
        model.train()
        for number, batch in enumerate(loader):
            if settings.resume and epoch == first_epoch and number < to_leave_out:
                continue
            loss = _step(accelerator, model, optimizer, schedule, noise_scheduler, batch["input"])
            average.step(model.parameters())
            done += 1
            if accelerator.is_main_process and done % settings.checkpoint_every == 0:
                accelerator.save_state(str(settings.output / f"checkpoint-{done}"))
            logs = {"loss": loss.detach().item(), "lr": schedule.get_last_lr()[0], "ema_decay": average.cur_decay_value}
            accelerator.log(logs, step=done)
            if recorder is not None:
                recorder.step_done(done - 1, logs["loss"], batch["key"])
            yield done
            if done == settings.steps:
                _finish(accelerator, settings, model, average, noise_scheduler)
                return


def _step(
    accelerator: Any, model: Any, optimizer: Any, schedule: Any, noise_scheduler: Any, clean: torch.Tensor
) -> torch.Tensor:
    noise = torch.randn(clean.shape, dtype=clean.dtype, device=clean.device)
    timesteps = torch.randint(0, noise_scheduler.config.num_train_timesteps, (clean.shape[0],), device=clean.device)
    noisy = noise_scheduler.add_noise(clean, noise, timesteps)
    with accelerator.accumulate(model):
        prediction = model(noisy, timesteps).sample
        loss = F.mse_loss(prediction.float(), noise.float())
        accelerator.backward(loss)
        if accelerator.sync_gradients:
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return loss


def _model(settings: PlainSettings, *, size_px: int) -> Any:  # diffusers ships no types
    make: Any = UNet2DModel
    return make(
        sample_size=size_px,
        in_channels=3,
        out_channels=3,
        layers_per_block=settings.layers_per_block,
        block_out_channels=settings.channels,
        down_block_types=tuple("AttnDownBlock2D" if on else "DownBlock2D" for on in settings.attention),
        up_block_types=tuple("AttnUpBlock2D" if on else "UpBlock2D" for on in reversed(settings.attention)),
        attention_head_dim=settings.attention_head_channels,
        norm_num_groups=settings.norm_groups,
    )


def _load_newest(accelerator: Any, output: Path) -> int:
    """Load the newest checkpoint, if there is one; returns its step."""
    steps = [int(path.name.removeprefix("checkpoint-")) for path in output.glob("checkpoint-*")]
    if not steps:
        return 0
    accelerator.load_state(str(output / f"checkpoint-{max(steps)}"))
    return max(steps)


def _finish(accelerator: Any, settings: PlainSettings, model: Any, average: EMAModel, noise_scheduler: Any) -> None:
    if settings.save_pipeline:
        unet = accelerator.unwrap_model(model)
        average.copy_to(unet.parameters())
        make_pipeline: Any = DDPMPipeline
        make_pipeline(unet=unet, scheduler=noise_scheduler).save_pretrained(settings.output / "pipeline")
    accelerator.end_training()


class _Recorder:
    """Writes the same lines that Muster's trainer writes, so that one reader does for both."""

    def __init__(self, settings: PlainSettings) -> None:
        settings.output.mkdir(parents=True, exist_ok=True)
        self._attempt = settings.attempt
        self._metrics = (settings.output / "metrics.jsonl").open("ab", buffering=0)
        self._samples = (settings.output / "samples-rank0.jsonl").open("ab", buffering=0)

    def step_done(self, step: int, loss: float, keys: list[str]) -> None:
        facts = {"attempt": self._attempt, "step": step}
        self._samples.write(_line({**facts, "positions": list(range(len(keys))), "keys": keys}))
        self._metrics.write(_line({**facts, "loss": loss, "time": time.time()}))


def _line(record: dict[str, Any]) -> bytes:
    return json.dumps(record).encode() + b"\n"


def settings_from(values: dict[str, Any]) -> PlainSettings:
    """Make settings of what JSON can hold."""
    lists = {key: tuple(value) for key, value in values.items() if isinstance(value, list)}
    paths = {key: Path(values[key]) for key in ("pictures", "output")}
    return PlainSettings(**{**values, **lists, **paths})


def main() -> int:
    """Run the loop as a program. Under Slurm, a requeued job resumes, as a careful user's batch script would have it."""
    settings = settings_from(json.loads(sys.argv[1]))
    restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    if restarts:
        settings = PlainSettings(**{**vars(settings), "resume": True, "attempt": restarts + 1})
    for _ in train(settings):
        pass
    return 0


if __name__ == "__main__":
    sys.exit(main())
