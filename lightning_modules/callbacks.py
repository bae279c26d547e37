"""Callbacks that make a run one that can be stopped, or killed, at any moment and continued to the same weights.

Lightning's checkpoints hold the weights, the optimizer and how far the loops are. What else decides the next step is
the random state (`RandomState`), and the point at which the state is taken: `RunCheckpoint` saves *between two
batches*, when everything that belongs to the batch before, validation and logging included, is done.
"""

import contextlib
import os
import random
import shutil
import signal
from pathlib import Path
from types import FrameType
from typing import Any, cast

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lightning_modules import labels
from lightning_modules.checkpoints import BEST, LAST, first_difference
from lightning_modules.executions import say
from lightning_modules.processes import gather, of_all_processes

PROGRESS = ("ready", "started", "processed", "completed")


class Interrupted(SystemExit):
    """Ends the process after SIGINT or SIGTERM, with the shell's exit status for that signal.

    Attributes:
        message: one line for the user.
    """

    def __init__(self, signum: int, message: str):
        super().__init__(128 + signum)
        self.message = message

    def __str__(self) -> str:
        return self.message


class RandomState(Callback):
    """Carries the random states of torch, CUDA, NumPy and Python over to a continued run, and past validation.

    They are saved in every checkpoint and set again right before the first batch of the continued run. Validation
    leaves them as they were, so training does not depend on when it is validated.

    Of several processes each draws numbers of its own, as for dropout. A run may go on with another number of
    processes; those that the checkpoint knows nothing of begin as in a new run.
    """

    def __init__(self) -> None:
        self._of_training: dict[str, Any] | None = None
        self._saved: list[dict[str, Any]] | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"processes": gather(self._of_training or random_state())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        before = random_state()
        try:
            self._saved = list(state_dict["processes"])
            for state in self._saved:
                set_random_state(state)
        except (AttributeError, KeyError, OverflowError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"the checkpoint is damaged: its random state cannot be set ({error})") from error
        finally:
            set_random_state(before)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_rank:  # Lightning has given all of them the same seed, which is right for the weights only
            torch.manual_seed(torch.initial_seed() + trainer.global_rank)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if self._saved is None:
            return
        if len(self._saved) != trainer.world_size:
            say(f"goes on with {trainer.world_size} instead of {len(self._saved)} processes: dropout draws otherwise")
        if trainer.global_rank < len(self._saved):
            set_random_state(self._saved[trainer.global_rank])
        self._saved = None

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._of_training = random_state()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._of_training is not None:
            set_random_state(self._of_training)
            self._of_training = None


def random_state() -> dict[str, Any]:
    """The states of all global random generators, as plain data and tensors."""
    _, keys, position, has_gauss, cached = cast(tuple, np.random.get_state())
    state = {
        "python": random.getstate(),
        "numpy": (keys.tolist(), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Sets what `random_state` gave."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    keys, position, *rest = state["numpy"]
    if not 0 <= position <= len(keys):  # NumPy would read beyond them
        raise ValueError(f"the position among NumPy's keys is {position}")
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, *rest))
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())


class RunCheckpoint(Checkpoint):
    """Writes `last.ckpt` and `best.ckpt`, and stops a run cleanly at SIGINT (Ctrl-C) and SIGTERM.

    `last.ckpt` is written before the first batch, every `every_n_train_steps` optimizer steps, after each validation
    and at the end; `best.ckpt` is the one of them with the lowest `monitor`. The first signal lets the batch finish,
    writes `last.ckpt` and raises `Interrupted`; a second one ends the process at once. Of several processes it is
    enough that one receives the signal: all stop after the same batch.

    It is written for `PlainCheckpointIO` and batches that follow from the trainer's progress, as `TextDataModule`'s do.

    Args:
        folder: where to write.
        every_n_train_steps: optimizer steps from one `last.ckpt` to the next.
        monitor: the logged value that the best checkpoint has least of.
        data: options of the data module, stored for evaluation under the key `data`.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        every_n_train_steps: int = 200,
        monitor: str = "val_loss",
        data: dict[str, Any] | None = None,
    ):
        if every_n_train_steps < 1:
            raise ValueError(f"every_n_train_steps must be at least 1; got {every_n_train_steps}")
        self.folder, self.every_n_train_steps = Path(folder), every_n_train_steps
        self.monitor, self.data = monitor, data
        self.best_score = float("inf")
        self._saved_step = -1
        self._score_is_new = self._score_is_best = False
        self._interrupting_validation = False
        self._restored: dict[str, Any] | None = None
        self._signal = 0

    @property
    def last_model_path(self) -> str:
        """Path of `last.ckpt`; empty as long as there is none."""
        return self._existing(LAST)

    @property
    def best_model_path(self) -> str:
        """Path of `best.ckpt`; empty as long as there is none. `Trainer.test(ckpt_path="best")` reads it."""
        return self._existing(BEST)

    def _existing(self, name: str) -> str:
        path = self.folder / name
        return str(path) if path.is_file() else ""

    # --- when to save -------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._signal = 0
        # Lightning sets the handlers from before its own training again when it ends, in whatever way.
        with contextlib.suppress(ValueError):  # not in the main thread, where signals do not arrive
            for signum in (signal.SIGINT, signal.SIGTERM):
                signal.signal(signum, self._on_signal)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._restored is not None:
            trainer.fit_loop.epoch_loop._batches_that_stepped = self._restored["batches_that_stepped"]
            self._restored = None
        if batch_idx % trainer.accumulate_grad_batches:
            return  # gradients are pending, which no checkpoint holds
        step, signum = trainer.global_step, self._received(trainer)
        is_due = self._saved_step < 0 or step - self._saved_step >= self.every_n_train_steps
        if self._score_is_new or (step > self._saved_step and (is_due or signum)):
            self._save(trainer)
        self._stop_if_interrupted(signum, trainer)

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if trainer.state.fn != TrainerFn.FITTING or not (signum := self._received(trainer)):
            return
        # After the last step Lightning would not come back to the validation, so an earlier checkpoint must do.
        is_last = trainer.global_step == trainer.max_steps
        if not (trainer.sanity_checking or is_last or trainer.fit_loop._should_accumulate()):
            self._interrupting_validation = True
            self._save(trainer)
        self._stop_if_interrupted(signum, trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        self._score_is_new = True
        score = trainer.callback_metrics.get(self.monitor)
        if score is not None and float(score) < self.best_score:
            self.best_score, self._score_is_best = float(score), True

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step > self._saved_step or self._score_is_new:
            self._save(trainer)

    def _save(self, trainer: L.Trainer) -> None:
        if trainer.fast_dev_run:
            return
        trainer.save_checkpoint(self.folder / LAST, weights_only=False)
        if self._score_is_best and trainer.is_global_zero:
            self._name_best()
        self._saved_step = trainer.global_step
        self._score_is_new = self._score_is_best = False

    def _name_best(self) -> None:
        """Gives `last.ckpt` the second name `best.ckpt`; files are replaced as a whole, so the names part later."""
        new = self.folder / f".{BEST}.new"
        new.unlink(missing_ok=True)
        try:
            os.link(self.folder / LAST, new)
        except OSError:  # a file system without hard links
            shutil.copyfile(self.folder / LAST, new)
        os.replace(new, self.folder / BEST)

    # --- signals ------------------------------------------------------------------------------------------------

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        if self._signal:
            signal.signal(signum, signal.SIG_DFL)
            signal.raise_signal(signum)
        self._signal = signum
        if rank_zero_only.rank:
            return
        # A write to `sys.stderr` could come in the middle of another one.
        text = labels.with_label("stopping after this batch; once more to end at once", labels.current())
        os.write(2, f"\nqattn: {text}\n".encode())

    def _received(self, trainer: L.Trainer) -> int:
        """The signal that any of the processes has received; each of them must ask at the same point."""
        signum = self._signal or (signal.SIGTERM if trainer.received_sigterm else 0)
        if trainer.world_size == 1:
            return signum
        received = torch.tensor(int(signum), device=trainer.strategy.root_device)
        return int(trainer.strategy.reduce(received, reduce_op="max"))

    def _stop_if_interrupted(self, signum: int, trainer: L.Trainer) -> None:
        if signum:
            name, step = signal.Signals(signum).name, trainer.global_step
            saved = f"last checkpoint: {self.last_model_path}" if self.last_model_path else "nothing is saved yet"
            raise of_all_processes(Interrupted(signum, f"stopped by {name} at step {step}; {saved}"))

    # --- what is saved ------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {"best_score": self.best_score, "is_best": self._score_is_best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_score = state_dict["best_score"]
        # Should the run have been killed before the best checkpoint got its name, it gets it now.
        self._score_is_new = self._score_is_best = state_dict["is_best"]

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        stepped = trainer.fit_loop.epoch_loop._batches_that_stepped
        checkpoint["run"] = {
            "batches_that_stepped": stepped + self._interrupting_validation,
            "trainer": _settings(trainer),
        }
        if self.data is not None:
            checkpoint["data"] = self.data
        _set_position(checkpoint["loops"]["fit_loop"], trainer.num_training_batches, self._interrupting_validation)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != TrainerFn.FITTING or "run" not in checkpoint:
            return
        self._restored = checkpoint["run"]
        is_own = Path(trainer.ckpt_path).resolve().parent == self.folder.resolve() and self.last_model_path
        self._saved_step = checkpoint["global_step"] if is_own else -1  # another run's: begin a folder
        if found := first_difference(self._restored["trainer"], _settings(trainer), "trainer"):
            raise ValueError(f"cannot continue exactly: {found}; use the trainer options that the run began with")


def _settings(trainer: L.Trainer) -> dict[str, Any]:
    """The options of the trainer that the weights depend on."""
    algorithm = trainer.gradient_clip_algorithm
    return {
        "accumulate_grad_batches": trainer.accumulate_grad_batches,
        "gradient_clip_algorithm": str(getattr(algorithm, "value", algorithm) or "norm"),
        "gradient_clip_val": trainer.gradient_clip_val,
        "limit_train_batches": trainer.limit_train_batches,
        "overfit_batches": trainer.overfit_batches,
        "precision": str(trainer.precision),
    }


def _set_position(loops: dict[str, Any], batches_per_epoch: int | float, in_validation: bool) -> None:
    """Writes into the saved progress of the loops that batch `b` of epoch `p` is the next, in one way for all cases.

    Lightning resumes in ways that differ with the hook that saved, and counts an epoch that `max_steps` has cut short
    as a whole one; a run continued from there would go on with another epoch.
    """
    epochs, batches = loops["epoch_progress"], loops["epoch_loop.batch_progress"]
    validation = loops["epoch_loop.val_loop.batch_progress"]
    epoch, batch = epochs["current"]["processed"], batches["current"]["completed"]
    training_has_ended = epochs["current"]["started"] == epoch
    if training_has_ended and batch < batches_per_epoch:
        epoch -= 1
    elif training_has_ended:
        batch = 0
    for part in ("total", "current"):
        epochs[part].update(ready=epoch + 1, started=epoch + 1, processed=epoch, completed=epoch)
    batches["current"].update(dict.fromkeys(PROGRESS, batch))
    batches["total"].update(dict.fromkeys(PROGRESS, batches["total"]["completed"]))
    batches["is_last_batch"] = False
    if in_validation:  # to be done again from its first batch
        validation["current"].update(dict.fromkeys(PROGRESS, 0))
        validation["total"].update(ready=1, started=1, processed=0, completed=0)
