"""The picture of a run's loss."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np

from jobs.records import lineage, read_json_lines

_SMOOTHED_OVER = 25  # steps


def draw_loss_curve(metrics: Path, picture: Path) -> None:
    """Draw the loss of each step that counts, and where attempts began, as PNG; written beside and then renamed."""
    from matplotlib.backends.backend_agg import (
        FigureCanvasAgg,  # no pyplot: it looks for a display and keeps global state
    )
    from matplotlib.figure import Figure

    records = [parts[-1] for parts in lineage(read_json_lines(metrics)).values()]
    steps = np.array([record["step"] + 1 for record in records])
    losses = np.array([record["loss"] for record in records])
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=0.8, label="loss of a step")
    if len(losses) >= 2 * _SMOOTHED_OVER:
        smooth = np.convolve(losses, np.full(_SMOOTHED_OVER, 1 / _SMOOTHED_OVER), mode="valid")
        axes.plot(steps[_SMOOTHED_OVER - 1 :], smooth, color="tab:blue", label=f"mean of {_SMOOTHED_OVER} steps")
    begins = [after for before, after in itertools.pairwise(records) if before["attempt"] != after["attempt"]]
    for number, record in enumerate(begins):
        axes.axvline(record["step"] + 0.5, color="tab:orange", linestyle="--", label="resumed" if number == 0 else None)
    axes.set(xlabel="optimizer step", ylabel="loss", yscale="log")
    axes.legend()
    beside = picture.with_name(f".{picture.name}.tmp")
    figure.savefig(beside, format="png", dpi=120)
    beside.replace(picture)
