"""The model, its objective, the average of its weights and the pictures drawn from it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from cluster.errors import InterruptedRunError, JobError
from jobs.ema import AveragedWeights
from jobs.loss_curve import draw_loss_curve
from jobs.model import build_model, count_parameters
from jobs.objective import DiffusionObjective, loss_weights, make_scheduler_config
from jobs.records import JsonLines
from jobs.sample import draw_samples, make_grid, save_picture
from jobs.settings import Ema, Model, Objective, TrainConfig

SMALL = Model(channels=(8, 16), layers_per_block=1, norm_groups=4, attention_head_channels=8)
CPU = torch.device("cpu")


class Oracle(nn.Module):
    """Predicts what it was told to, whatever it is given."""

    def __init__(self, answer: torch.Tensor) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, noisy: torch.Tensor, timesteps: torch.Tensor, return_dict: bool) -> tuple[torch.Tensor]:
        self.noisy = noisy
        return (self.answer,)


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (6, 3, 4, 4), dtype=torch.uint8, generator=generator)
    return images, torch.randn(6, 3, 4, 4, generator=generator), torch.tensor([0, 10, 300, 500, 900, 999])


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_noise_and_target_are_those_of_diffusers(prediction: Any) -> None:
    """The noisy picture is DDPMScheduler's, and predicting its target (noise, or velocity) exactly costs nothing."""
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    settings = Objective(prediction=prediction)
    images, noise, timesteps = batch()
    clean = images.float() / 127.5 - 1
    scheduler = DDPMScheduler(**make_scheduler_config(settings))
    target = noise if prediction == "epsilon" else scheduler.get_velocity(clean, noise, timesteps)
    oracle = Oracle(target)
    assert DiffusionObjective(settings, CPU).loss(oracle, images, noise, timesteps).item() < 1e-10
    assert torch.allclose(oracle.noisy, scheduler.add_noise(clean, noise, timesteps), atol=1e-6)


def test_without_weights_the_loss_is_the_mean_squared_error() -> None:
    """Predicting zero costs the mean square of the target."""
    images, noise, timesteps = batch()
    settings = Objective(prediction="epsilon", min_snr_gamma=None)
    loss = DiffusionObjective(settings, CPU).loss(Oracle(torch.zeros_like(noise)), images, noise, timesteps)
    assert loss.item() == pytest.approx(noise.square().mean().item(), rel=1e-5)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_min_snr_weighs_the_predicted_picture_by_the_clipped_ratio(prediction: Any) -> None:
    """Whatever is predicted, an error of the implied clean picture counts min(SNR, gamma) times: both forms are one objective."""
    alphas = torch.tensor([0.999, 0.9, 0.5, 0.1, 0.001], dtype=torch.float64)
    ratio = alphas / (1 - alphas)
    weight = loss_weights(alphas, Objective(prediction=prediction, min_snr_gamma=5.0))
    # d(clean)/d(epsilon) = sqrt((1-a)/a), d(clean)/d(v) = sqrt(1-a)
    squared_slope = (1 - alphas) / alphas if prediction == "epsilon" else 1 - alphas
    assert torch.allclose(weight, ratio.clamp(max=5.0) * squared_slope)


def test_zero_terminal_snr_stays_finite() -> None:
    """At the last timestep, which is pure noise, the velocity objective has a finite weight and loss."""
    settings = Objective(zero_terminal_snr=True)
    images, noise, _ = batch()
    loss = DiffusionObjective(settings, CPU).loss(Oracle(torch.zeros_like(noise)), images, noise, torch.full((6,), 999))
    assert torch.isfinite(loss)


def test_the_first_weights_depend_on_the_seed_alone() -> None:
    """Two models of a seed are alike, of two seeds not, and the caller's random numbers are not used up."""
    before = torch.get_rng_state()
    one, two, three = (build_model(SMALL, height=8, width=8, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    pairs = list(zip(one.parameters(), two.parameters(), three.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert not all(torch.equal(a, c) for a, _, c in pairs)
    assert count_parameters(one) == sum(a.numel() for a, _, _ in pairs)


def test_pictures_that_cannot_be_halved_are_explained() -> None:
    """The message has the size, the number of levels and what would do."""
    with pytest.raises(JobError, match=r"9 x 8 pixels cannot be halved 1 times.*multiples of 2"):
        build_model(SMALL, height=9, width=8, seed=0)


def test_building_the_model_does_not_load_transformers() -> None:
    """Nothing of pipelines or transformers is imported before the first step; afterwards transformers can still be."""
    code = (
        "import sys\nfrom jobs.model import build_model\nfrom jobs.settings import Model\n"
        "build_model(Model(channels=(16,), norm_groups=4, attention_head_channels=8), height=8, width=8, seed=0)\n"
        "import jobs.reporter, jobs.training, jobs.train\n"
        "bad = ('transformers', 'tensorboard', 'matplotlib', 'diffusers.pipelines.pipeline_utils', 'PIL.PngImagePlugin')\n"
        "print([name for name in bad if sys.modules.get(name)])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        timeout=240,
        check=True,
    )
    assert done.stdout.strip() == "[]"


def test_the_average_follows_the_weights() -> None:
    """Each update moves the average by 1 - decay of the way; with a warm-up the first ones move it most of the way."""
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(0.0)
    plain, warm = (
        AveragedWeights(model, Ema(decay=0.9, warmup=False)),
        AveragedWeights(model, Ema(decay=0.9, warmup=True)),
    )
    model.weight.data.fill_(1.0)
    expected_plain = expected_warm = 0.0
    for step in range(1, 200):
        plain.update(step)
        warm.update(step)
        expected_plain += 0.1 * (1 - expected_plain)
        expected_warm += (1 - min(0.9, (1 + step) / (10 + step))) * (1 - expected_warm)
    assert plain.state_dict()["weight"].item() == pytest.approx(expected_plain, rel=1e-5)
    assert warm.state_dict()["weight"].item() == pytest.approx(expected_warm, rel=1e-5)
    assert warm.decay_after(1) == pytest.approx(2 / 11)


def test_the_average_stands_in_for_the_weights_and_gives_way_again() -> None:
    """Inside the block the model uses the average; afterwards, also after an error, its own weights, which can still be trained."""
    model = nn.Linear(2, 2)
    ema = AveragedWeights(model, Ema(decay=0.5, warmup=False))
    average = model.weight.detach().clone()
    with torch.no_grad():
        model.weight.add_(1.0)
    own = model.weight.detach().clone()

    def use_and_fail() -> None:
        with ema.in_place_of(model):
            assert torch.equal(model.weight, average)
            raise KeyError

    with pytest.raises(KeyError):
        use_and_fail()
    assert torch.equal(model.weight, own)
    with torch.no_grad():
        model.weight.add_(1.0)
    ema.update(1)
    assert torch.allclose(ema.state_dict()["weight"], average + 1.0)


def test_saved_averages_are_taken_over() -> None:
    """What one object saved another one continues, in place, without becoming the saved tensors."""
    model = nn.Linear(2, 2)
    one, other = AveragedWeights(model, Ema()), AveragedWeights(nn.Linear(2, 2), Ema())
    other.load_state_dict(one.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))
    other.state_dict()["weight"].zero_()
    assert one.state_dict()["weight"].abs().sum() > 0


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return build_model(SMALL, height=8, width=8, seed=0)


@pytest.fixture(scope="module")
def config() -> TrainConfig:
    return TrainConfig.model_validate({"run_directory": "r", "data": {"directory": "d"}, "model": SMALL.model_dump()})


def draw(model: nn.Module, config: TrainConfig, **changes: Any) -> np.ndarray:
    return draw_samples(
        model, config, **{"numbers": range(3), "height": 8, "width": 8, "inference_steps": 3, **changes}
    )


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:diffusers")
@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpm++"])
def test_pictures_depend_on_the_seed_and_nothing_else(model: nn.Module, config: TrainConfig, sampler: Any) -> None:
    """The same again, also when drawn one at a time and with other random numbers used before; others with another seed."""
    before = torch.get_rng_state()
    first = draw(model, config, sampler=sampler)
    assert torch.equal(before, torch.get_rng_state())
    assert (first.shape, first.dtype) == ((3, 8, 8, 3), np.uint8)
    torch.manual_seed(99)
    again = draw(model, config, sampler=sampler, batch_size=1)
    assert np.abs(first.astype(int) - again.astype(int)).max() <= 1  # sums in convolutions depend on the batch
    assert not np.array_equal(first, draw(model, config, sampler=sampler, seed=1))
    third = draw(model, config, sampler=sampler, numbers=[2])[0]
    assert np.abs(first[2].astype(int) - third.astype(int)).max() <= 1


def test_a_rank_without_a_share_draws_nothing(model: nn.Module, config: TrainConfig) -> None:
    """Fewer pictures than ranks leave some ranks with none, which is no error."""
    assert draw(model, config, numbers=range(5, 4, 8)).shape == (0, 8, 8, 3)


def test_drawing_can_be_stopped_and_leaves_the_model_in_training(model: nn.Module, config: TrainConfig) -> None:
    """A request to stop is heard between two denoising steps."""
    answers = iter([False, True])
    model.train()
    with pytest.raises(InterruptedRunError):
        draw(model, config, should_stop=lambda: next(answers))
    assert model.training


def test_a_grid_has_all_pictures_in_order() -> None:
    """Five pictures take three columns and two rows, with the free place white."""
    pictures = np.stack([np.full((4, 6, 3), number, dtype=np.uint8) for number in range(5)])
    grid = make_grid(pictures)
    assert grid.shape == (2 * 5 + 1, 3 * 7 + 1, 3)
    assert [int(grid[1, 1, 0]), int(grid[1, 8, 0]), int(grid[6, 1, 0]), int(grid[6, 8, 0]), int(grid[6, 15, 0])] == [
        0,
        1,
        3,
        4,
        255,
    ]


def test_small_pictures_are_enlarged_by_whole_numbers(tmp_path: Path) -> None:
    """A pixel becomes a square, so that 16-pixel pictures can be looked at; no unfinished file is left."""
    save_picture(np.arange(4 * 4 * 3, dtype=np.uint8).reshape(4, 4, 3), tmp_path / "a.png", least_px=10)
    with Image.open(tmp_path / "a.png") as opened:
        image = np.asarray(opened)
    assert image.shape == (12, 12, 3)
    assert (image[:3, :3] == image[0, 0]).all()
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_the_loss_curve_is_drawn_from_any_number_of_steps(tmp_path: Path) -> None:
    """One step, or many with a resume in between, give a picture without a warning."""
    for count in (1, 2, 120):
        metrics = tmp_path / f"{count}.jsonl"
        with JsonLines(metrics) as lines:
            for step in range(count):
                lines.append({"attempt": 1 + (step > 60), "step": step, "loss": 1 / (step + 1)})
        draw_loss_curve(metrics, tmp_path / "loss.png")
        with Image.open(tmp_path / "loss.png") as picture:
            assert picture.size == (960, 540)
