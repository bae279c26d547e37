"""Anneals the temperature of amplification: from soft marks, which learn, to hard ones, which search."""

import math
from typing import Literal

import lightning as L
from lightning.pytorch.callbacks import Callback

from lightning_modules.language_model import LanguageModel, planned_steps
from pennylane_qattn import AmplificationScore


class AnnealTemperature(Callback):
    """Sets the temperature of every `grover` attention before each step, by the step's number alone.

    A run that is continued therefore goes on where it was, and checkpoints hold the temperature they were made with.
    In mechanisms the temperature must be `fixed`: one that is learned belongs to the optimizer.

    Args:
        start: temperature at the first step, in the unit of the scores.
        end: at step `steps`, and from then on.
        steps: optimizer steps until then; by default all of the run.
        schedule: `exponential`, the same factor from step to step, or `linear`.

    Raises:
        ValueError: for a temperature that is not positive and finite, steps below 1, or an unknown schedule; at the
            beginning of a run, for a model without such an attention, or a run without an end to anneal to.
    """

    def __init__(
        self,
        start: float = 2.0,
        end: float = 0.2,
        steps: int | None = None,
        schedule: Literal["exponential", "linear"] = "exponential",
    ):
        for name, value in (("start", start), ("end", end)):
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be a positive and finite temperature; got {value}")
        if steps is not None and steps < 1:
            raise ValueError(f"steps must be at least 1; got {steps}")
        if schedule not in ("exponential", "linear"):
            raise ValueError(f"unknown schedule {schedule!r}; choose from exponential, linear")
        self.start, self.end, self.steps, self.schedule = start, end, steps, schedule

    def temperature_at(self, step: int, steps: float) -> float:
        """The temperature of optimizer step `step`, the first one being 0."""
        done = min(1.0, step / steps)
        if self.schedule == "linear":
            return self.start + (self.end - self.start) * done
        return self.start * (self.end / self.start) ** done

    def on_fit_start(self, trainer: L.Trainer, pl_module: LanguageModel) -> None:
        self._scores = [part for part in pl_module.modules() if isinstance(part, AmplificationScore)]
        if not self._scores:
            raise ValueError(
                "AnnealTemperature has nothing to anneal: there is no amplification in the model; leave it out, or "
                "choose the attention grover"
            )
        for score in self._scores:
            score.check_can_be_annealed()
        self._steps = self.steps or planned_steps(trainer, (trainer.datamodule or pl_module).train_dataloader)
        if self._steps == math.inf:
            raise ValueError("AnnealTemperature needs an end; give max_steps or max_epochs, or its own steps")

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: LanguageModel, *_) -> None:
        temperature = self.temperature_at(trainer.global_step, self._steps)
        for score in self._scores:
            score.set_temperature(temperature)
        if trainer._logger_connector.should_update_logs:
            pl_module.log("temperature", temperature)
