"""Executions of circuits on devices: said before the first one, counted, and logged."""

import sys
from dataclasses import replace
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import nn

from lightning_modules import labels
from lightning_modules.language_model import LanguageModel, planned_steps
from pennylane_qattn import Execution
from pennylane_qattn.execution import executors


class Executions(Callback):
    """Says how the circuits are run, and counts what runs on a device.

    Before the first execution on a device that is no exact simulator of this machine, the executions that are needed
    per step and in all are printed: at most so many, as equal circuits may run once. In training, `executions`, those
    of all processes so far, is logged.
    """

    def setup(self, trainer: L.Trainer, pl_module: LanguageModel, stage: str) -> None:
        if trainer.world_size > 1:  # each process draws shots of its own, and has its share of the budget
            execution, ranks = pl_module.execution, trainer.world_size
            limit = execution.max_executions and max(1, execution.max_executions // ranks)
            seed = execution.seed * ranks + trainer.global_rank
            pl_module.set_execution(replace(execution, seed=seed, max_executions=limit))

    def on_fit_start(self, trainer: L.Trainer, pl_module: LanguageModel) -> None:
        explain(pl_module)
        if not costs(pl_module):
            return
        data = trainer.datamodule
        batches = trainer.accumulate_grad_batches * trainer.world_size
        per_step = batches * needed(pl_module, data.batch_size * data.block_size, training=True)
        steps = planned_steps(trainer, data.train_dataloader) - trainer.global_step
        total = f"{int(steps * per_step):,} for {int(steps):,} steps" if steps < float("inf") else "without end"
        say(f"at most {per_step:,} executions per training step, {total}, and those of validation besides")

    def on_validation_start(self, trainer: L.Trainer, pl_module: LanguageModel) -> None:
        if trainer.state.fn == "validate":
            self._announce(trainer, pl_module, sum(trainer.num_val_batches))

    def on_test_start(self, trainer: L.Trainer, pl_module: LanguageModel) -> None:
        self._announce(trainer, pl_module, sum(trainer.num_test_batches))

    def on_predict_start(self, trainer: L.Trainer, pl_module: LanguageModel) -> None:
        self._announce(trainer, pl_module, sum(trainer.num_predict_batches))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: LanguageModel, *_: Any) -> None:
        if trainer._logger_connector.should_update_logs and (done := executed(pl_module)):
            pl_module.log("executions", float(done), sync_dist=True, reduce_fx="sum")

    def on_validation_end(self, trainer: L.Trainer, pl_module: LanguageModel) -> None:
        if trainer.state.fn == "validate":
            self._conclude(trainer, pl_module)

    def on_fit_end(self, trainer: L.Trainer, pl_module: LanguageModel) -> None:
        self._conclude(trainer, pl_module)

    def on_test_end(self, trainer: L.Trainer, pl_module: LanguageModel) -> None:
        self._conclude(trainer, pl_module)

    def on_predict_end(self, trainer: L.Trainer, pl_module: LanguageModel) -> None:
        self._conclude(trainer, pl_module)

    def _announce(self, trainer: L.Trainer, model: LanguageModel, batches: int) -> None:
        explain(model)
        if costs(model):
            tokens = trainer.world_size * batches * trainer.datamodule.batch_size * trainer.datamodule.block_size
            say(f"at most {needed(model, tokens, training=False):,} executions")

    def _conclude(self, trainer: L.Trainer, model: LanguageModel) -> None:
        done = torch.tensor(executed(model), device=trainer.strategy.root_device)
        if done := int(trainer.strategy.reduce(done, reduce_op="sum")):
            say(f"{done:,} executions")


def explain(model: LanguageModel) -> None:
    """Says what runs the circuits, unless that is what it always is: folded because that is best."""
    lines = dict.fromkeys(plan.explain() for plan in model.plans)
    if model.execution != Execution() and not model.plans:
        lines = {f"{model.attention.name} attention has none, so model.execution changes nothing": None}
    if any(plan.executor != "folded" for plan in model.plans) or model.execution != Execution():
        for line in lines:
            say(f"circuits: {line}")


def needed(module: nn.Module, tokens: int, training: bool) -> int:
    """Executions that a pass over so many tokens needs at most, with its gradients in training."""
    return sum(executor.count(tokens, training) for executor in executors(module))


def executed(module: nn.Module) -> int:
    """Executions on devices so far."""
    return sum(meter.executions for meter in {id(e.meter): e.meter for e in executors(module)}.values())


def costs(module: nn.Module) -> bool:
    """Whether anything runs elsewhere than on an exact simulator of this machine."""
    return any(not executor.plan.is_local_and_exact for executor in executors(module))


@rank_zero_only
def say(text: str) -> None:
    """One line on stderr, in the name of the command and with the label of the run."""
    print(f"qattn: {labels.with_label(text, labels.current())}", file=sys.stderr)
