"""TrainConfig: everything that decides how a diffusion model is trained.

Loading it does no network and no torch. Every default trains something sensible; unknown keys are refused with the nearest
names. A run keeps its configuration: `config.yaml` in the run directory, and inside each checkpoint. What may differ when a run
goes on is stated once, in `MAY_CHANGE`; anything else would make the second half of the run another experiment: an error.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from cluster.errors import JobError
from cluster.yamlfile import YamlDocument, dump_yaml, field_name, parse_yaml, read_yaml, validate

MAY_CHANGE: frozenset[str] = frozenset(
    {
        "checkpoint",
        "data.directory",
        "data.max_bad",
        "data.prefetch",
        "data.workers",
        "evaluation",
        "progress",
        "record_samples",
        "retries",
        "run_directory",
        "sampling",
        "steps",
        "steps_to_run",
        "threads",
        "trackers",
    }
)
"""Keys (with everything under them) that may differ when a run is resumed: how far, how often, where, watched by whom.

`data.directory` may move because the fingerprint of the data is compared by itself. With `schedule.kind: cosine`, other `steps`
stretch the rest of the curve. Other `threads` take sums in another order, so losses then differ in the last bits.
"""


class Section(BaseModel):
    """Base of every part of the configuration."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True)


class Data(Section):
    """Where the pictures come from."""

    directory: Path
    """Directory of tar shards with their index: written by `jobs.preprocess`, or any others that webdataset reads."""
    size_px: int | None = Field(default=None, ge=4, le=4096)
    """Centre-crop and scale pictures to this many pixels a side; as stored by default, and then all must be alike."""
    workers: int = Field(default=0, ge=0, le=64)
    """Processes that decode pictures and draw noise ahead of the step. 0 does it inside the step, which is best where the cores
    are the accelerator."""
    prefetch: int = Field(default=2, ge=1, le=64)
    """Batches that each worker prepares ahead."""
    max_bad: int = Field(default=100, ge=0)
    """Damaged samples that are replaced (and named) before the run stops."""
    horizontal_flip: float = Field(default=0.0, ge=0, le=1)
    """Probability that a picture is mirrored. Off by default: text, flags and clocks are not symmetric."""


class Model(Section):
    """The UNet (diffusers' UNet2DModel). The size of the pictures comes from the data."""

    channels: tuple[int, ...] = Field(default=(64, 128, 128), min_length=1, max_length=8)
    """Channels of each level; each level after the first halves the picture."""
    layers_per_block: int = Field(default=2, ge=1, le=8)
    """Residual blocks of each level."""
    attention: tuple[bool, ...] | None = None
    """Whether each level has self-attention; by default only the lowest has."""
    attention_head_channels: int = Field(default=32, ge=1)
    """Channels of one attention head; must divide those of every level with attention, and of the lowest."""
    norm_groups: int = Field(default=16, ge=1)
    """Groups of the group normalisation; must divide every entry of `channels`."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Drawn on the device, so losses then repeat to the bit only with the same number of ranks."""
    channels_last: bool | None = None
    """Keep activations with the channels innermost. By default only on GPUs, whose tensor cores work that way; on CPUs it saves
    a third on some and costs a few per cent on others (docs/performance.md)."""
    compile: bool = False
    """Use torch.compile. Saves time on GPUs, costs a minute at each start."""

    @model_validator(mode="after")
    def _fits_together(self) -> Model:
        odd = [c for c in self.channels if c % self.norm_groups]
        if odd:
            raise ValueError(
                f"norm_groups ({self.norm_groups}) must divide every entry of channels, not so {odd}; change either"
            )
        if self.attention is not None and len(self.attention) != len(self.channels):
            raise ValueError(
                f"attention has {len(self.attention)} entries and channels has {len(self.channels)}; give one for each level"
            )
        attending = [c for c, on in zip(self.channels, self.attention_levels(), strict=True) if on]
        odd = [c for c in dict.fromkeys([*attending, self.channels[-1]]) if c % self.attention_head_channels]
        if odd:
            raise ValueError(
                f"attention_head_channels ({self.attention_head_channels}) must divide the channels of levels with attention "
                f"and of the lowest, not so {odd}; change either"
            )
        return self

    def attention_levels(self) -> tuple[bool, ...]:
        """Return whether each level has self-attention."""
        return self.attention or (*(False,) * (len(self.channels) - 1), True)


class Objective(Section):
    """What the model learns to predict, and how errors are weighed."""

    prediction: Literal["epsilon", "v_prediction"] = "v_prediction"
    """The noise, or the velocity of Salimans & Ho, 2022 (https://arxiv.org/abs/2202.00512)."""
    timesteps: int = Field(default=1000, ge=2, le=10_000)
    """Length of the noising chain."""
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "squaredcos_cap_v2"
    """How noise grows along the chain. The cosine keeps small pictures visible for longer than the linear one does."""
    zero_terminal_snr: bool = False
    """Make the last step pure noise (https://arxiv.org/abs/2305.08891). Only with v_prediction."""
    min_snr_gamma: float | None = Field(default=5.0, gt=0)
    """Clip the signal-to-noise ratio in the loss weight here (Hang et al., 2023, https://arxiv.org/abs/2303.09556); null: no
    weight."""
    timestep_sampling: Literal["stratified", "uniform"] = "stratified"
    """`stratified` spreads the timesteps of a batch evenly over the chain from a random start (Kingma et al., 2021,
    https://arxiv.org/abs/2107.00630): each is still uniform, the batch's loss swings less."""

    @model_validator(mode="after")
    def _is_defined(self) -> Objective:
        if self.zero_terminal_snr and self.prediction == "epsilon":
            raise ValueError(
                "zero_terminal_snr leaves epsilon undefined at the last timestep; use prediction: v_prediction with it"
            )
        return self


class Optimizer(Section):
    """AdamW."""

    learning_rate: float = Field(default=3e-4, gt=0)
    """Highest learning rate, reached at the end of the warm-up."""
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = Field(default=0.01, ge=0)
    epsilon: float = Field(default=1e-8, gt=0)
    clip_norm: float = Field(default=1.0, ge=0)
    """Longest gradient (2-norm over all parameters); 0 leaves gradients as they are."""


class Schedule(Section):
    """The learning rate over optimizer steps, whatever the number of ranks and micro-steps."""

    kind: Literal["constant", "cosine"] = "cosine"
    warmup_steps: int = Field(default=100, ge=0)
    """Steps over which the rate rises linearly from near 0."""
    final_ratio: float = Field(default=0.05, ge=0, le=1)
    """Rate at the last step of `cosine`, as a share of the highest."""


class Ema(Section):
    """The running average of the weights, which pictures are drawn with."""

    decay: float = Field(default=0.999, ge=0, lt=1)
    """Longest memory: about 1 / (1 - decay) steps."""
    warmup: bool = True
    """Start with a short memory, (1 + step) / (10 + step), so that short runs are not averaged with their random start."""


class Checkpoint(Section):
    """When state is saved."""

    every_steps: int = Field(default=500, ge=1)
    """Optimizer steps between saves. On preemption, at a time limit and at the end it is saved anyway."""
    keep: int = Field(default=3, ge=1)
    """Checkpoints kept. The last good one is never deleted."""


class Evaluation(Section):
    """Loss of the averaged weights on fixed pictures, noise and timesteps: a curve without the noise of single batches."""

    every_steps: int = Field(default=0, ge=0)
    """Optimizer steps between evaluations; 0 for none."""
    batches: int = Field(default=4, ge=1)
    """Global batches in each."""


class Sampling(Section):
    """Pictures drawn while training and at its end."""

    every_steps: int = Field(default=0, ge=0)
    """Optimizer steps between grids for the trackers; 0 for only the last one."""
    count: int = Field(default=64, ge=1, le=4096)
    """Pictures in a grid."""
    sampler: Literal["ddim", "ddpm", "dpm++"] = "ddim"
    inference_steps: int = Field(default=50, ge=1, le=1000)
    seed: int = Field(default=0, ge=0)
    """The same noise for every grid, so that grids of one run can be compared."""


class Progress(Section):
    """What is said while training."""

    log_every_s: float = Field(default=10.0, gt=0)
    """Seconds between plain lines where nobody watches a terminal. The first and last steps always have a line."""
    track_every_steps: int = Field(default=1, ge=1)
    """Steps between values for the trackers. `metrics.jsonl` has every step."""


class TrainConfig(Section):
    """A training run."""

    run_directory: Path
    """Where everything of this run lives: checkpoints, metrics, journal, pictures. A second start here goes on."""
    data: Data
    steps: int = Field(default=10_000, ge=1)
    """Optimizer steps of the whole run."""
    steps_to_run: int | None = Field(default=None, ge=1)
    """Be done after this many of `steps`, for a first look or a reference: rates stay laid out for all of them."""
    batch_size: int = Field(default=64, ge=1)
    """Pictures in one optimizer step over all ranks and micro-steps. It does not change with the number of ranks."""
    gradient_accumulation: int = Field(default=1, ge=1)
    """Micro-steps of one optimizer step."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Decides the first weights, the order of pictures, noise, timesteps and augmentation."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 runs the forward pass under autocast; weights and their averages stay fp32."""
    deterministic: bool = False
    """Only algorithms that give the same bits each time, on GPUs too, where they are slower. On CPUs they all do."""
    threads: int = Field(default=0, ge=0)
    """Threads of each rank for CPU work; 0 divides the cores that this process may use among the node's ranks."""
    model: Model = Model()
    objective: Objective = Objective()
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    ema: Ema = Ema()
    checkpoint: Checkpoint = Checkpoint()
    evaluation: Evaluation = Evaluation()
    sampling: Sampling = Sampling()
    progress: Progress = Progress()
    trackers: tuple[str, ...] = ("tensorboard",)
    """Trackers by accelerate's names: tensorboard, wandb, mlflow, aim, ... Their packages must be installed."""
    retries: int = Field(default=3, ge=0, le=1000)
    """How often a failed attempt is followed by another one without a new checkpoint in between. Preemption does not count."""
    record_samples: bool = False
    """Note in `samples-rank<r>.jsonl` which pictures each rank has really decoded for each step."""

    @property
    def last_step(self) -> int:
        """Number of steps after which the run is done."""
        return min(self.steps, self.steps_to_run or self.steps)

    def micro_batch_size(self, world_size: int) -> int:
        """Return the pictures of one rank in one micro-step.

        Raises:
            JobError: `batch_size` cannot be divided evenly; the message has the numbers of ranks that would do.
        """
        parts = world_size * self.gradient_accumulation
        if self.batch_size % parts:
            each = self.batch_size // self.gradient_accumulation
            fitting = [n for n in range(1, each + 1) if self.batch_size % (n * self.gradient_accumulation) == 0]
            below = self.batch_size // parts * parts
            sizes = f"{below} or {below + parts}" if below else str(parts)
            raise JobError(
                f"batch_size ({self.batch_size}) is for all ranks together, so ranks ({world_size}) * gradient_accumulation "
                f"({self.gradient_accumulation}) must divide it; use batch_size {sizes} (in a new run), or ranks among: "
                f"{', '.join(map(str, fitting)) or 'none with this gradient_accumulation'}"
            )
        return self.batch_size // parts

    def as_plain(self) -> dict[str, Any]:
        """Return the configuration as what YAML and JSON can hold."""
        return self.model_dump(mode="json")

    def digest(self) -> str:
        """Return a short hash of all that may not change (see `MAY_CHANGE`)."""
        fixed = {key: value for key, value in flatten(self.as_plain()).items() if not may_change(key)}
        return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()[:16]


def load_config(path: Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a training configuration.

    Args:
        path: A YAML file: a TrainConfig, or a job description that holds one under `config`.
        overrides: `key.inner=value`, the value written as in YAML; they win over the file.

    Raises:
        JobError: A value is wrong; the message lists every mistake with its line.
        InputError: The file cannot be read or is not YAML.
    """
    document = read_yaml(path)
    if isinstance(document.data, Mapping) and isinstance(document.data.get("config"), Mapping):
        inner = {keys[1:]: line for keys, line in document.lines.items() if keys[:1] == ("config",)}
        document = YamlDocument(document.data["config"], inner, document.source)
    return validate(TrainConfig, with_overrides(document, overrides), error_type=JobError)


def with_overrides(document: YamlDocument, overrides: Sequence[str]) -> YamlDocument:
    """Return the document with `key.inner=value` put in; sections on the way are made as needed.

    Raises:
        JobError: An override is not of that form, or goes through a value that is not a section.
    """
    data = json.loads(json.dumps(document.data)) if document.data is not None else {}
    for override in overrides:
        key, equals, text = override.partition("=")
        parts = key.strip().split(".")
        if not equals or not all(parts):
            raise JobError(
                f"--set {override}: expected key=value or section.key=value, such as --set optimizer.learning_rate=1e-4"
            )
        place = data
        for depth, part in enumerate(parts[:-1], start=1):
            place = place.setdefault(part, {}) if isinstance(place, dict) else None
            if not isinstance(place, dict):
                raise JobError(
                    f"--set {override}: {'.'.join(parts[:depth])} is a value, not a section; name the key itself"
                )
        place[parts[-1]] = parse_yaml(text, source=f"--set {key}").data
    return YamlDocument(data, document.lines, document.source)


def dump_config(config: TrainConfig) -> str:
    """Write the configuration as YAML that `load_config` reads back to the same one."""
    return dump_yaml(config.as_plain())


def changed_keys(before: Mapping[str, Any], after: TrainConfig) -> list[str]:
    """Say how `after` differs from a configuration saved earlier (its `as_plain`).

    Returns:
        One sentence for each key that differs and may.

    Raises:
        JobError: A key differs that may not. The message names every one with both values.
    """
    then, now = flatten(before), flatten(after.as_plain())
    # A key that only one side knows comes from another version of Muster: its default was in force then.
    differing = [key for key in now if key in then and then[key] != now[key]]
    fixed = [
        f"  {key}: {_shown(then[key])} in the run, {_shown(now[key])} now" for key in differing if not may_change(key)
    ]
    if fixed:
        raise JobError(
            "\n".join(
                [
                    f"{after.run_directory} holds a run with other settings, so going on would mix two experiments:",
                    *fixed,
                    "Put the old values back, or give a new run_directory. May change in a run: "
                    + ", ".join(sorted(MAY_CHANGE)),
                ]
            )
        )
    return [f"{key}: {_shown(then[key])} -> {_shown(now[key])}" for key in differing]


def may_change(key: str) -> bool:
    """Say whether `key` (as `data.workers`) may differ when a run goes on."""
    parts = key.split(".")
    return any(".".join(parts[:count]) in MAY_CHANGE for count in range(1, len(parts) + 1))


def flatten(tree: Mapping[str, Any], prefix: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the leaves of nested mappings by dotted key; lists count as leaves."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            leaves.update(flatten(value, (*prefix, key)))
        else:
            leaves[field_name((*prefix, key))] = value
    return leaves


def _shown(value: object) -> str:
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()
