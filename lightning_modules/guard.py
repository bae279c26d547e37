"""The guard of causality: a model is certified before it is trained and again when it has been.

What sees the future looks better than it is, so a model with a leak is not trained unless that is asked for, and then
everything that comes from it carries the word LEAKS.
"""

import math
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import nn

from lightning_modules import checkpoints
from lightning_modules.callbacks import RunCheckpoint
from lightning_modules.executions import say
from lightning_modules.labels import LEAKS, label_of, leaks
from lightning_modules.language_model import LanguageModel
from lightning_modules.loggers import set_label
from lightning_modules.processes import is_sharded, of_all_processes
from lightning_modules.progress import following
from pennylane_qattn import causality


class NonCausalError(RuntimeError):
    """A model depends on what it must not see.

    Attributes:
        certificate: what was found, as plain data.
    """

    def __init__(self, message: str, certificate: dict[str, Any]):
        super().__init__(message)
        self.certificate = certificate


class CausalityGuard(Callback):
    """Certifies a model before its first training step and after the last one, and stops a run that leaks.

    `qattn fit` has one. In a Trainer of your own, `Trainer(callbacks=[CausalityGuard()])` does the same. Checkpoints
    hold the certificate under the key `causality`. A leak raises `NonCausalError`: before training at once, at the end
    after `RunCheckpoint` has written its last checkpoint. Where a leak is allowed, or found at the end only, what
    loggers write and these checkpoints are labelled with the word LEAKS. A label stays: a run that is continued has
    it, whatever later certificates say. A certificate that is undecided, or of a part, stops nothing and is said. Some
    futures are looked at in calls as large as those of the run. A validation whose loss is below the least that a
    causal model can have, where that is known, counts as a leak: training stops after it unless that is allowed.

    Random states, weights and modes are as before. With several processes, the first one certifies and the others are
    told, so all of them stop or none. Where FSDP gives each a part of the weights, a copy of the whole is certified.

    Args:
        allow_noncausal: train a model that leaks, with the label.
        time_limit: seconds for one certificate, of which there are two.
        module: name of the submodule to certify; by default `gpt` if there is one, else the LightningModule itself.
        **options: of `pennylane_qattn.causality.certify`, for models that it cannot guess the inputs of.

    Attributes:
        certificate: the latest one; `None` before.
    """

    def __init__(
        self, allow_noncausal: bool = False, time_limit: float = 30.0, module: str | None = None, **options: Any
    ):
        if not 0 < time_limit < math.inf:
            raise ValueError(f"time_limit must be positive and finite, in seconds; got {time_limit}")
        self.allow_noncausal, self.time_limit = allow_noncausal, time_limit
        self.module, self.options = module, options
        self.certificate: causality.Certificate | None = None
        self._plain: dict[str, Any] | None = None  # what checkpoints hold: once it tells of a leak, that stays
        self._model: nn.Module | None = None  # that the certificate is of
        self._is_new = False  # whether the leak was found at the end

    @property
    def label(self) -> str:
        """`"LEAKS"`, or `""`."""
        return LEAKS if leaks(self._plain) else ""

    def check(self, model: nn.Module, batch_size: int | None = None, show: bool = True) -> causality.Certificate:
        """Certifies a model, as before training.

        Args:
            model: it.
            batch_size: rows of a batch of the run.
            show: whether what is found is said on stderr, where it is no pass.

        Raises:
            NonCausalError: if it leaks, or comes from a checkpoint that does, and that is not allowed.
        """
        self._plain = None
        with following(f"certifying {_name(model)}"):
            certificate = self._certify(model, batch_size)
        self._take(model, certificate, is_told=not show)
        self._stop_if_leaking("--allow-noncausal trains it all the same, under that label")
        return certificate

    # --- when -------------------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.strategy.restore_checkpoint_after_setup:
            self._begin(trainer, pl_module)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.strategy.restore_checkpoint_after_setup:  # the weights are there only now
            self._begin(trainer, pl_module)

    def _begin(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.ckpt_path is None and self._model is not pl_module:
            self._plain = None  # of another model
        is_due = self._model is not pl_module or trainer.ckpt_path is not None  # whose weights come after `check`
        self._certify_on_all(trainer, pl_module, is_due)
        self._stop_if_leaking("--allow-noncausal (allow_noncausal=True) trains it all the same, under that label")
        self._label_loggers(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        found = getattr(pl_module, "causality", None)  # by a model that knows the least loss there can be
        if trainer.state.fn != TrainerFn.FITTING or self.label or not leaks(found):
            return
        self._plain, self._is_new = found, True
        self._label_loggers(trainer)
        if trainer.is_global_zero:
            self._label_checkpoints(trainer)
        trainer.should_stop |= not self.allow_noncausal

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        label = self.label
        self._certify_on_all(trainer, pl_module, True)
        if self.label == label:
            return
        self._is_new = True
        self._label_loggers(trainer)
        if trainer.is_global_zero:
            self._label_checkpoints(trainer)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._is_new:
            self._is_new = False
            when = "after training" if self.certificate.label else "in validation"
            self._stop_if_leaking(f"found {when} only; the checkpoints are labelled")

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._plain is not None:
            checkpoint["causality"] = self._plain

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        earlier = checkpoint.get("causality")
        self._plain = earlier if leaks(earlier) else None

    # --- what -------------------------------------------------------------------------------------------------------

    def _certify_on_all(self, trainer: L.Trainer, model: L.LightningModule, is_due: bool) -> None:
        """Takes the certificate of the first process on all of them."""
        certificate, is_due = self.certificate, trainer.strategy.broadcast(is_due)
        if is_due:
            whole = _whole(trainer, model)  # asked for on all processes
            certificate = self._certify(whole, _batch_size(trainer)) if trainer.is_global_zero else None
        self._take(model, trainer.strategy.broadcast(certificate), is_told=not is_due)

    def _certify(self, model: nn.Module, batch_size: int | None) -> causality.Certificate:
        name = self.module or ("gpt" if isinstance(getattr(model, "gpt", None), nn.Module) else "")
        options = {"name": _name(model), "time_limit": self.time_limit, "run_batch_size": batch_size, **self.options}
        return causality.certify(model.get_submodule(name), **options)

    def _take(self, model: nn.Module, certificate: causality.Certificate, is_told: bool = False) -> None:
        self.certificate, self._model, label = certificate, model, self.label
        earlier = getattr(model, "causality", None) if self._plain is None else self._plain
        plain = certificate.to_plain()
        self._plain = earlier if leaks(earlier) and not leaks(plain) else plain
        if hasattr(model, "causality"):
            model.causality = self._plain
        if is_told:
            return
        if certificate.label and not label:
            _show(certificate)
        elif not certificate.passes or certificate.is_partial:
            say(certificate.summary())
        if self.label and not certificate.label:
            say("this run was found to leak before")

    def _stop_if_leaking(self, remedy: str) -> None:
        if self.label and not self.allow_noncausal:
            raise of_all_processes(NonCausalError(f"{_found(self._plain)}; {remedy}", self._plain))

    def _label_loggers(self, trainer: L.Trainer) -> None:
        for logger in trainer.loggers if self.label else ():
            set_label(logger, self.label)

    def _label_checkpoints(self, trainer: L.Trainer) -> None:
        """Those that were written before the leak was found; the last one is still to come."""
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, RunCheckpoint):
                for path in filter(None, (callback.best_model_path, callback.last_model_path)):
                    checkpoints.rewrite(Path(path), causality=self._plain)


def say_if_leaking(model: nn.Module, checkpoint: object) -> None:
    """Says on stderr that a checkpoint has the label, for commands whose output is about something else."""
    if label := label_of(model):
        say(f"{label}: the model of {checkpoint} sees later tokens, so its metrics are not those of a prediction")


def _found(certificate: dict[str, Any]) -> str:
    """The leak in one line, from plain data."""
    try:
        return causality.Certificate.from_plain(certificate).summary()
    except ValueError:  # of a checkpoint that something else has written
        return f"the model {LEAKS}, by the certificate in its checkpoint"


def _whole(trainer: L.Trainer, model: L.LightningModule) -> nn.Module:
    """The model, or where its weights are in parts a copy that, on the first process, has all of them."""
    if not is_sharded(trainer):
        return model
    if not isinstance(model, LanguageModel):
        raise ValueError(f"CausalityGuard puts no {type(model).__name__} together that FSDP shares out; use ddp, say")
    weights = trainer.strategy.lightning_module_state_dict()
    with torch.random.fork_rng(devices=[]):
        copy = LanguageModel.from_plain(model.to_plain())
    copy.causality = model.causality
    if trainer.is_global_zero:
        checkpoints.load_weights(copy, weights)
    return copy


def _batch_size(trainer: L.Trainer) -> int | None:
    """Rows of a batch of one process, if anything tells."""
    given = trainer.fit_loop._data_source.instance  # a loader, or a module that will make one
    told = (getattr(source, "batch_size", None) for source in (trainer.datamodule, trainer.train_dataloader, given))
    return next((size for size in told if isinstance(size, int) and size > 0), None)


def _name(model: nn.Module) -> str:
    attention = getattr(model, "attention", None)
    return f"{attention.name} GPT" if hasattr(attention, "name") else type(model).__name__


@rank_zero_only
def _show(certificate: causality.Certificate) -> None:
    print(certificate, file=sys.stderr)
