"""Pictures from a trained model, or from a run that is still going: `python -m jobs.sample --run RUN`."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from cluster.errors import InterruptedRunError, JobError, MusterError, NotFoundError
from jobs.settings import TrainConfig, load_config

Images = npt.NDArray[np.uint8]


def draw_samples(
    model: Any,
    config: TrainConfig,
    *,
    numbers: Sequence[int],
    height: int,
    width: int,
    sampler: Literal["ddim", "ddpm", "dpm++"] = "ddim",
    inference_steps: int = 50,
    seed: int = 0,
    batch_size: int = 64,
    should_stop: Callable[[], bool] = lambda: False,
) -> Images:
    """Draw pictures; the same ones for the same weights, seed and sampler, whichever others are drawn with them.

    Args:
        model: With the weights to use; as `jobs.model.build_model` makes it.
        config: What the model was trained with.
        numbers: Which pictures of the seed to draw: `range(8)` for the first eight.
        height: Of a picture.
        width: Of a picture.
        sampler: How to walk back along the noising chain.
        inference_steps: Steps of that walk.
        seed: Decides the noise that pictures start from.
        batch_size: Pictures drawn at one time.
        should_stop: Asked before each step of the walk.

    Returns:
        As many as `numbers` x height x width x RGB.

    Raises:
        InterruptedRunError: `should_stop` said so.
    """
    import torch

    from jobs.model import memory_format

    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    pictures = [np.empty((0, height, width, 3), dtype=np.uint8)]
    try:
        for first in range(0, len(numbers), batch_size):
            chosen = numbers[first : first + batch_size]
            generators = [torch.Generator().manual_seed(_seed_of(seed, number)) for number in chosen]
            start = torch.stack([torch.randn(3, height, width, generator=generator) for generator in generators])
            sample = start.to(device).contiguous(memory_format=memory_format(config.model, device))
            scheduler = _make_scheduler(config, sampler, inference_steps)
            chance = {"generator": generators} if sampler == "ddpm" else {}
            with torch.no_grad():
                for timestep in scheduler.timesteps:
                    if should_stop():
                        raise InterruptedRunError("stopped while drawing pictures")
                    steps = torch.full((len(generators),), int(timestep), device=device, dtype=torch.int64)
                    prediction = model(scheduler.scale_model_input(sample, timestep), steps, return_dict=False)[0]
                    sample = scheduler.step(prediction, timestep, sample, return_dict=False, **chance)[0]
            pixels = (sample.float().clamp(-1, 1) + 1).mul(127.5).round().to(torch.uint8)
            pictures.append(pixels.permute(0, 2, 3, 1).cpu().numpy())
    finally:
        model.train(was_training)
    return np.concatenate(pictures)


def make_grid(pictures: Images, *, margin_px: int = 1) -> Images:
    """Put pictures (count x height x width x RGB) side by side, as near to a square as their number allows, on white."""
    count, height, width, _ = pictures.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    grid = np.full(
        (rows * (height + margin_px) + margin_px, columns * (width + margin_px) + margin_px, 3), 255, dtype=np.uint8
    )
    for number, picture in enumerate(pictures):
        top = margin_px + number // columns * (height + margin_px)
        left = margin_px + number % columns * (width + margin_px)
        grid[top : top + height, left : left + width] = picture
    return grid


def save_picture(picture: Images, path: Path, *, least_px: int = 512) -> None:
    """Write a picture as PNG, beside and then renamed, enlarged by whole numbers so that small ones can be looked at."""
    from PIL import Image

    image = Image.fromarray(picture)
    scale = max(1, math.ceil(least_px / max(image.size)))
    image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    beside = path.with_name(f".{path.name}.tmp")
    image.save(beside, format="PNG")
    beside.replace(path)


def load_trained(
    run: Path, *, step: int | None = None, averaged: bool = True
) -> tuple[Any, TrainConfig, tuple[int, int], int]:
    """Build a run's model with the weights of one of its checkpoints, the newest sound one by default.

    Args:
        run: Run directory.
        step: Of the checkpoint.
        averaged: Take the running average instead of the last weights.

    Returns:
        Model on the CPU, configuration, (height, width) of its pictures, step.

    Raises:
        NotFoundError: There is no such checkpoint; the message lists those there are.
        StateError: It is damaged.
    """
    from jobs.checkpoint import checkpoint_path, list_steps, load_part, verify
    from jobs.model import build_model
    from jobs.run_files import RunFiles

    config = load_config(RunFiles(run).config)
    directory = RunFiles(run).checkpoints
    steps = list_steps(directory)
    wanted = steps if step is None else [step]
    if step is not None and step not in steps:
        raise NotFoundError(
            f"{directory} has no checkpoint of step {step}; it has {', '.join(map(str, steps)) or 'none'}"
        )
    said: list[str] = []
    for candidate in wanted:
        path = checkpoint_path(directory, candidate)
        manifest, problems = verify(path)
        if manifest is not None and not problems:
            height, width = load_part(path, "run")["picture_size"]
            model = build_model(config.model, height=height, width=width, seed=config.seed)
            model.load_state_dict(load_part(path, "ema" if averaged else "model"), strict=not averaged)
            return model, config, (height, width), candidate
        said += [f"{path.name}: {problem}" for problem in problems]
    raise NotFoundError(
        f"{directory} has no sound checkpoint{': ' + '; '.join(said) if said else ''}; has the run saved one yet?"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Draw pictures from the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m jobs.sample", description="Draw pictures from a training run.")
    parser.add_argument("--run", type=Path, required=True, help="run directory")
    parser.add_argument("--step", type=int, help="checkpoint to use; the newest sound one by default")
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sampler", choices=["ddim", "ddpm", "dpm++"], default="ddim")
    parser.add_argument("--inference-steps", type=int, default=50)
    parser.add_argument("--last-weights", action="store_true", help="use the last weights instead of their average")
    parser.add_argument("--out", type=Path, help="PNG to write; RUN/samples-<step>.png by default")
    options = parser.parse_args(argv)
    try:
        if options.count < 1 or options.inference_steps < 1:
            raise JobError(
                f"--count {options.count} and --inference-steps {options.inference_steps} must be at least 1"
            )
        model, config, (height, width), step = load_trained(
            options.run, step=options.step, averaged=not options.last_weights
        )
        pictures = draw_samples(
            model,
            config,
            numbers=range(options.count),
            height=height,
            width=width,
            sampler=options.sampler,
            inference_steps=options.inference_steps,
            seed=options.seed,
        )
        out = options.out or options.run / f"samples-{step:08d}.png"
        save_picture(make_grid(pictures), out)
    except MusterError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    sys.stdout.write(f"{out}: {options.count} pictures from step {step}\n")
    return 0


def _make_scheduler(config: TrainConfig, sampler: str, inference_steps: int) -> Any:
    from jobs.objective import make_scheduler_config

    settings = make_scheduler_config(config.objective)
    scheduler: Any
    # "trailing" starts at the very last timestep, where training saw (nearly) pure noise (https://arxiv.org/abs/2305.08891).
    if sampler == "ddim":
        from diffusers.schedulers.scheduling_ddim import DDIMScheduler

        scheduler = DDIMScheduler(**settings, clip_sample=True, timestep_spacing="trailing")
    elif sampler == "ddpm":
        from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

        scheduler = DDPMScheduler(**settings, clip_sample=True, timestep_spacing="trailing")
    else:
        from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

        scheduler = DPMSolverMultistepScheduler(**settings, timestep_spacing="trailing")
    scheduler.set_timesteps(min(inference_steps, config.objective.timesteps))
    return scheduler


def _seed_of(seed: int, number: int) -> int:
    """Give each picture noise of its own, so that its look does not depend on how many are drawn together."""
    return (seed * 1_000_003 + number) % 2**63


if __name__ == "__main__":
    sys.exit(main())
