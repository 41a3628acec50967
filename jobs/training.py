"""What a rank holds while it trains, how that is built, and how it takes over where an earlier attempt stopped."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from cluster.errors import JobError
from jobs.batches import Pictures, Share, picture_size
from jobs.checkpoint import Checkpointer, State
from jobs.collectives import LoneRank, Ranks, TorchRanks, on_rank_0
from jobs.ema import AveragedWeights
from jobs.interruption import Agreement, StopSignals
from jobs.model import build_model, count_parameters, memory_format
from jobs.objective import DiffusionObjective
from jobs.process_group import RankInfo, open_process_group
from jobs.run_files import RunFiles
from jobs.settings import TrainConfig, changed_keys

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Training:
    """Everything that one rank holds while it trains."""

    config: TrainConfig
    files: RunFiles
    info: RankInfo
    stop: StopSignals
    ranks: Ranks
    agreement: Agreement
    accelerator: Accelerator
    pictures: Pictures
    picture_size: tuple[int, int]
    """Height and width."""
    share: Share
    bare_model: nn.Module
    """The model itself, for sampling, evaluation and saving."""
    model: nn.Module
    """The model as it is trained: under DDP where there are several ranks, and compiled if so configured."""
    objective: DiffusionObjective
    optimizer: torch.optim.Optimizer
    ema: AveragedWeights
    checkpointer: Checkpointer
    step: int = 0
    """Optimizer steps done, over all attempts."""
    saved_step: int | None = None
    """Step of the last committed checkpoint."""

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that speaks and writes for all."""
        return self.info.rank == 0

    @property
    def is_stop_requested(self) -> bool:
        """Whether this rank has been signalled; the others may not know yet."""
        return self.stop.requested is not None

    def state(self) -> State:
        """Return what a checkpoint holds of this rank; tensors are not copied."""
        return State(
            step=self.step,
            replicated={
                "model": self.bare_model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "ema": self.ema.state_dict(),
                "run": {
                    "step": self.step,
                    "samples_seen": self.step * self.config.batch_size,
                    "picture_size": list(self.picture_size),
                    "threads": torch.get_num_threads(),
                },
            },
            own={"random": random_state()},
            config=self.config.as_plain(),
            config_digest=self.config.digest(),
            data_fingerprint=self.pictures.fingerprint,
        )


def set_up(config: TrainConfig, info: RankInfo, stop: StopSignals) -> Training:
    """Bring the ranks together and build everything in its initial state.

    Raises:
        JobError: The configuration does not fit the data or the number of ranks.
        OutsideError: Not all ranks came, or the run directory cannot be written.
        InterruptedRunError: A stop was asked for meanwhile.
    """
    micro_batch_size = config.micro_batch_size(info.world_size)
    _tell_accelerate(info)
    _set_up_arithmetic(config, info)
    open_process_group(info, stop=stop)
    ranks: Ranks = TorchRanks() if info.world_size > 1 else LoneRank()
    agreement = Agreement.open(info.world_size)
    accelerator = _make_accelerator(config)

    pictures = _open_pictures(config, ranks)
    height, width = picture_size(pictures)
    bare_model = build_model(config.model, height=height, width=width, seed=config.seed, device=accelerator.device)
    if info.rank == 0:
        logger.info("%d pictures of %d x %d, %d parameters", len(pictures), height, width, count_parameters(bare_model))
    model = accelerator.prepare_model(torch.compile(bare_model) if config.model.compile else bare_model)
    share = Share(info.rank, info.world_size, config.gradient_accumulation, micro_batch_size)
    training = Training(
        config=config,
        files=RunFiles(config.run_directory),
        info=info,
        stop=stop,
        ranks=ranks,
        agreement=agreement,
        accelerator=accelerator,
        pictures=pictures,
        picture_size=(height, width),
        share=share,
        bare_model=bare_model,
        model=model,
        objective=DiffusionObjective(
            config.objective, accelerator.device, memory_format(config.model, accelerator.device)
        ),
        optimizer=_make_optimizer(config, bare_model),
        ema=AveragedWeights(bare_model, config.ema),
        checkpointer=Checkpointer(RunFiles(config.run_directory).checkpoints, ranks, keep=config.checkpoint.keep),
    )
    _settle_gradient_buckets(training)
    torch.manual_seed(hash_of(config.seed, info.rank))
    return training


def resume(training: Training) -> list[str]:
    """Take over the newest sound checkpoint, if there is one; a collective call.

    Returns:
        What is to be said about it, a sentence each.

    Raises:
        JobError: The run was begun with other settings or other data.
        StateError: All checkpoints are damaged.
    """
    removed = training.checkpointer.prepare()
    said = [f"removed what a killed save had left: {name}" for name in removed]
    loaded = training.checkpointer.load_newest()
    if loaded is None:
        return said
    config, manifest = training.config, loaded.manifest
    said += [f"changed since the last attempt: {change}" for change in changed_keys(manifest.config, config)]
    if manifest.data_fingerprint != training.pictures.fingerprint:
        raise JobError(
            f"data.directory ({config.data.directory}) holds other pictures (fingerprint {training.pictures.fingerprint[:12]}) "
            f"than this run was begun with ({manifest.data_fingerprint[:12]}); give those back, or a new run_directory"
        )
    training.bare_model.load_state_dict(loaded.replicated["model"])
    training.optimizer.load_state_dict(loaded.replicated["optimizer"])
    training.ema.load_state_dict(loaded.replicated["ema"])
    training.step = training.saved_step = manifest.step
    if loaded.own is not None and manifest.world_size == training.info.world_size:
        restore_random_state(loaded.own["random"])
    else:
        torch.manual_seed(hash_of(config.seed, training.info.rank, manifest.step))
        said.append(
            f"saved by {manifest.world_size} ranks, going on with {training.info.world_size}: the same samples, noise and "
            "timesteps; sums are taken in another order, so losses differ in their last bits"
        )
    threads = loaded.replicated["run"]["threads"]
    if threads != torch.get_num_threads() and training.accelerator.device.type == "cpu":
        said.append(
            f"saved with {threads} threads a rank, going on with {torch.get_num_threads()}: losses differ in their last bits"
        )
    return [*said, f"going on from {loaded.path.name}"]


def random_state() -> dict[str, Any]:
    """Return the state of every random generator of this process, as plain values and tensors."""
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "python": list(random.getstate()),
        "numpy": [
            kind,
            torch.from_numpy(np.asarray(keys, dtype=np.int64)),
            int(position),
            int(has_gauss),
            float(gauss),
        ],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Put back what `random_state` returned."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def hash_of(*numbers: int) -> int:
    """Return a seed made of several numbers, unlike that of any others."""
    return int(np.random.SeedSequence(numbers).generate_state(1, dtype=np.uint64)[0] >> np.uint64(1))


def _make_accelerator(config: TrainConfig) -> Accelerator:
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, ProjectConfiguration

    from jobs.trackers import check_trackers

    files = RunFiles(config.run_directory)
    check_trackers(config.trackers)
    return Accelerator(
        mixed_precision="bf16" if config.precision == "bf16" else "no",
        cpu=not torch.cuda.is_available(),
        log_with=list(config.trackers) or None,
        project_config=ProjectConfiguration(project_dir=str(files.directory), logging_dir=str(files.tracker_logs)),
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )


def _tell_accelerate(info: RankInfo) -> None:
    """Put into the environment what accelerate reads: it knows nothing of Slurm. A single rank needs no process group."""
    if info.world_size > 1:
        os.environ.update(info.export())
        return
    for name in info.export():
        os.environ.pop(name, None)


def _set_up_arithmetic(config: TrainConfig, info: RankInfo) -> None:
    """Fix how sums are taken, as far as bits depend on it."""
    threads = config.threads or max(1, len(os.sched_getaffinity(0)) // info.local_world_size)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # else accelerate chooses a number of its own
    torch.set_num_threads(threads)
    if config.precision == "bf16":
        torch.set_float32_matmul_precision("high")
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # asked for by the function below
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False


def _open_pictures(config: TrainConfig, ranks: Ranks) -> Pictures:
    """Open the data, on the first rank first: it may have to index foreign shards."""
    from jobs.data import ShardDataset

    def opened() -> ShardDataset:
        return ShardDataset(config.data.directory, max_bad=config.data.max_bad, size_px=config.data.size_px)

    kept: list[ShardDataset] = []
    on_rank_0(ranks, lambda: kept.append(opened()))
    pictures = kept[0] if kept else opened()
    seen = ranks.gather(pictures.fingerprint)
    if len(set(seen)) > 1:
        raise JobError(
            f"data.directory ({config.data.directory}) is not the same on all ranks: {len(set(seen))} fingerprints; it must be "
            "on a file system that all nodes share"
        )
    return pictures


def _make_optimizer(config: TrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    settings = config.optimizer
    return torch.optim.AdamW(
        model.parameters(),
        lr=settings.learning_rate,
        betas=settings.betas,
        weight_decay=settings.weight_decay,
        eps=settings.epsilon,
        fused=True,
    )


def _settle_gradient_buckets(training: Training) -> None:
    """Let DDP see one backward pass before the first step.

    DDP lays out its gradient buckets anew after the first backward pass of a process, in the order in which gradients came.
    With more than two ranks the layout decides in which order their gradients are added, so the first step after a resume
    would differ in its last bits from the same step of a run that was not stopped. With two ranks a + b = b + a.
    """
    if training.info.world_size <= 2:
        return
    height, width = training.picture_size
    device = training.accelerator.device
    nothing = torch.zeros(training.share.micro_batch_size, 3, height, width, device=device)
    timesteps = torch.zeros(training.share.micro_batch_size, dtype=torch.int64, device=device)
    for _ in range(2):  # the layout changes at the start of the second
        training.accelerator.backward(training.objective.loss(training.model, nothing, nothing.clone(), timesteps))
    training.optimizer.zero_grad()
