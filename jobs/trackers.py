"""Experiment trackers (TensorBoard, Weights & Biases, MLflow, ...) through accelerate's common interface."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from cluster.errors import JobError
from jobs.settings import TrainConfig, flatten

logger = logging.getLogger(__name__)


class Trackers:
    """The trackers of a run, on its first rank; elsewhere nothing happens.

    They are opened with the first value, after the first step: importing TensorBoard alone takes as long as many steps. One
    that fails (a full disk, a service that does not answer) is dropped with a warning: training goes on well without it.
    """

    def __init__(self, accelerator: Any, config: TrainConfig, *, first_step: int) -> None:
        self._accelerator = accelerator
        self._config = config
        self._first_step = first_step
        self._open: list[Any] | None = None

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Send numbers that belong to `step`."""
        self._each(lambda tracker: tracker.log(dict(values), step=step))

    def log_picture(self, name: str, picture: npt.NDArray[np.uint8], step: int) -> None:
        """Send a picture (height x width x RGB) to those trackers that take pictures."""

        def send(tracker: Any) -> None:
            if tracker.name == "tensorboard":
                tracker.log_images({name: picture[None]}, step=step, dataformats="NHWC")
            elif hasattr(tracker, "log_images"):
                tracker.log_images({name: [picture]}, step=step)

        self._each(send)

    def close(self) -> None:
        """Let trackers write what they hold back."""
        if self._open:
            self._each(lambda tracker: tracker.finish())
        self._open = []

    def _each(self, action: Any) -> None:
        if self._open is None:
            self._open = self._start()
        for tracker in list(self._open):
            try:
                action(tracker)
            except (
                Exception
            ) as error:  # a tracker is another's code and another's service: it must not end the training
                logger.warning("tracker %s failed and is dropped: %s", tracker.name, error)
                self._open.remove(tracker)

    def _start(self) -> list[Any]:
        if not self._accelerator.is_main_process or not self._config.trackers:
            return []
        name = self._config.run_directory.name or "run"
        try:
            # A resumed run takes its place on the same curves: what an earlier attempt logged beyond this step is hidden.
            self._accelerator.init_trackers(name, init_kwargs={"tensorboard": {"purge_step": self._first_step}})
            for tracker in self._accelerator.trackers:
                if (
                    tracker.name != "tensorboard"
                ):  # which would make a folder of its own for each attempt's configuration
                    tracker.store_init_configuration(flatten(self._config.as_plain()))
        except Exception as error:  # as above
            logger.warning("trackers %s could not be opened: %s", ", ".join(self._config.trackers), error)
        return list(self._accelerator.trackers)


def check_trackers(names: tuple[str, ...]) -> None:
    """Refuse trackers that accelerate does not know, or whose package is absent.

    Raises:
        JobError: Names those that can be used here.
    """
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    able = {str(getattr(tracker, "value", tracker)) for tracker in get_available_trackers()}
    wrong = [name for name in names if name not in able]
    if wrong:
        known = {str(getattr(key, "value", key)) for key in LOGGER_TYPE_TO_CLASS}
        why = "is not installed here" if wrong[0] in known else "is no tracker that accelerate knows"
        raise JobError(f"trackers: {wrong[0]} {why}; you can use: {', '.join(sorted(able)) or 'none'}")
