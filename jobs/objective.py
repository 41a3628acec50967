"""The training objective: add noise, predict it (or the velocity), weigh the error by the signal-to-noise ratio."""

from __future__ import annotations

from typing import Any

import torch

from jobs.settings import Objective


def make_scheduler_config(settings: Objective) -> dict[str, Any]:
    """Return what diffusers' schedulers are built with, for training and sampling alike."""
    return {
        "num_train_timesteps": settings.timesteps,
        "beta_schedule": settings.beta_schedule,
        "prediction_type": settings.prediction,
        "rescale_betas_zero_snr": settings.zero_terminal_snr,
    }


class DiffusionObjective:
    """The loss of a batch, with all that depends only on the timestep worked out once."""

    def __init__(
        self, settings: Objective, device: torch.device, memory_format: torch.memory_format = torch.contiguous_format
    ) -> None:
        from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

        alphas_cumprod = DDPMScheduler(**make_scheduler_config(settings)).alphas_cumprod.double()
        self._format = memory_format
        self._velocity = settings.prediction == "v_prediction"
        self._signal = alphas_cumprod.sqrt().float().to(device)
        self._noise = (1.0 - alphas_cumprod).sqrt().float().to(device)
        self._weight = loss_weights(alphas_cumprod, settings).float().to(device)

    def loss(
        self, model: torch.nn.Module, images: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """Return the mean weighted squared error of the batch, a float32 scalar.

        Args:
            model: As `jobs.model.build_model` makes it, or wrapped.
            images: 0 to 255, b x 3 x height x width.
            noise: Standard normal of the same shape.
            timesteps: int64, b.
        """
        # One pass each into the model's own order in memory: a convolution follows its input's, not only its weights'.
        clean = images.to(torch.float32, memory_format=self._format, copy=True).div_(127.5).sub_(1.0)
        noise = noise.contiguous(memory_format=self._format)
        signal = self._signal[timesteps].view(-1, 1, 1, 1)
        noise_level = self._noise[timesteps].view(-1, 1, 1, 1)
        noisy = clean * signal + noise * noise_level
        target = noise * signal - clean * noise_level if self._velocity else noise
        prediction: torch.Tensor = model(noisy, timesteps, return_dict=False)[0]
        error = (prediction.float() - target).square_().mean(dim=(1, 2, 3))
        weighted: torch.Tensor = error * self._weight[timesteps]
        return weighted.mean()


def loss_weights(alphas_cumprod: torch.Tensor, settings: Objective) -> torch.Tensor:
    """Return the weight of each timestep's squared error: min-SNR (Hang et al., 2023), or 1.

    The paper weighs the error of the predicted picture by min(SNR, gamma). The error of epsilon is SNR times that, the
    error of v SNR + 1 times, hence the divisors.
    """
    if settings.min_snr_gamma is None:
        return torch.ones_like(alphas_cumprod)
    ratio = alphas_cumprod / (1.0 - alphas_cumprod)
    clipped = ratio.clamp(max=settings.min_snr_gamma)
    return clipped / (ratio + 1.0) if settings.prediction == "v_prediction" else clipped / ratio
