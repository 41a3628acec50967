"""Where a training run keeps what it writes, all under its run directory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunFiles:
    """Names in a run directory. The journal and `job.yaml` beside them are others' (`jobs.journal`, `jobs.run_folder`)."""

    directory: Path

    @property
    def config(self) -> Path:
        """The configuration in force."""
        return self.directory / "config.yaml"

    @property
    def checkpoints(self) -> Path:
        """Committed checkpoints and saves under way (`jobs.checkpoint`)."""
        return self.directory / "checkpoints"

    @property
    def metrics(self) -> Path:
        """A line for each step of each attempt, by rank 0."""
        return self.directory / "metrics.jsonl"

    @property
    def pictures(self) -> Path:
        """The last grid of pictures."""
        return self.directory / "samples.png"

    @property
    def loss_curve(self) -> Path:
        """The loss over all steps that count."""
        return self.directory / "loss.png"

    @property
    def model(self) -> Path:
        """The averaged weights as diffusers reads them: `UNet2DModel.from_pretrained(RUN / "model")`."""
        return self.directory / "model"

    @property
    def tracker_logs(self) -> Path:
        """Where TensorBoard and the like keep their files."""
        return self.directory / "logs"

    def samples_of(self, rank: int) -> Path:
        """What a rank has decoded for each step, if `record_samples` is on."""
        return self.directory / f"samples-rank{rank}.jsonl"
