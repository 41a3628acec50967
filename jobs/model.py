"""The model: diffusers' unconditional UNet, built from the configuration."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from cluster.errors import JobError
from jobs.settings import Model

_CPU = torch.device("cpu")


def build_model(settings: Model, *, height: int, width: int, seed: int, device: torch.device = _CPU) -> torch.nn.Module:
    """Make a UNet2DModel with random weights that only `seed` decides, on `device`. The caller's random state stays as it is.

    Its forward takes (b x 3 x height x width, timesteps b, return_dict=False) and returns a tuple with the prediction.

    Raises:
        JobError: The pictures cannot be halved as often as the model has levels.
    """
    levels = len(settings.channels)
    unit = 2 ** (levels - 1)
    if height % unit or width % unit:
        raise JobError(
            f"pictures of {height} x {width} pixels cannot be halved {levels - 1} times; use fewer model.channels "
            f"(now {levels}) or pictures whose sides are multiples of {unit}"
        )
    with _without_transformers():
        from diffusers.models.unets.unet_2d import UNet2DModel

    attention = settings.attention_levels()
    model: torch.nn.Module
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = UNet2DModel(
            sample_size=(height, width),
            in_channels=3,
            out_channels=3,
            layers_per_block=settings.layers_per_block,
            block_out_channels=settings.channels,
            down_block_types=tuple("AttnDownBlock2D" if on else "DownBlock2D" for on in attention),
            up_block_types=tuple("AttnUpBlock2D" if on else "UpBlock2D" for on in reversed(attention)),
            attention_head_dim=settings.attention_head_channels,
            norm_num_groups=settings.norm_groups,
            dropout=settings.dropout,
        )
    model.to(device)
    model.to(memory_format=memory_format(settings, device))  # type: ignore[call-overload] # torch leaves this one out of its types
    return model


def memory_format(settings: Model, device: torch.device) -> torch.memory_format:
    """Return the order of dimensions in memory that the model computes in."""
    channels_last = device.type == "cuda" if settings.channels_last is None else settings.channels_last
    return torch.channels_last if channels_last else torch.contiguous_format


def count_parameters(model: torch.nn.Module) -> int:
    """Return the number of trained values."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


@contextmanager
def _without_transformers() -> Iterator[None]:
    """Keep diffusers from importing transformers, of which a UNet uses nothing: it adds 1.5 CPU-seconds to every (re)start.

    None in `sys.modules` is how the import system marks a module as absent. diffusers looks once, when it is first imported. If
    that has happened, it is left to what it found; where it happens here, diffusers' text pipelines stay out of reach in this
    process.
    """
    loaded: dict[str, Any] = sys.modules
    if "transformers" in loaded or "diffusers" in loaded:
        yield
        return
    loaded["transformers"] = None
    try:
        yield
    finally:
        del loaded["transformers"]
