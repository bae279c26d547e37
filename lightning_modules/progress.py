"""How far a run is, and how long it still takes: bars on a terminal, lines of text elsewhere."""

import contextlib
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import lightning as L
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from lightning_modules import labels

Item = TypeVar("Item")
#: Seconds between two lines on one thing.
EVERY = 10.0
#: Seconds between two looks of a bar at what is done, and before it appears: what is soon done needs none.
LOOK, PATIENCE = 0.1, 0.5


def duration(seconds: float) -> str:
    """`45 s`, `12 min` or `1.6 h`."""
    minutes = round(seconds / 60)
    return f"{round(seconds)} s" if seconds < 90 else f"{minutes} min" if minutes < 90 else f"{minutes / 60:.1f} h"


class Pace:
    """How long something still takes, if it goes on as it did so far.

    Args:
        done: how much of it is done as it begins, as in a run that goes on.
    """

    def __init__(self, done: float = 0):
        self._done, self._begun = done, time.monotonic()
        self._said = self._begun

    def is_due(self) -> bool:
        """Whether `EVERY` seconds have passed since it was last said."""
        return time.monotonic() - self._said >= EVERY

    def say(self, done: float, total: float) -> str:
        """`12 s, about 45 s left`, of which the last is left out where nothing can be known."""
        self._said = time.monotonic()
        seconds = self._said - self._begun
        text = duration(seconds)
        if done > self._done and done < total < math.inf:
            text += f", about {duration(seconds * (total - done) / (done - self._done))} left"
        return text


# --- work outside of a Trainer ----------------------------------------------------------------------------------


def shown(items: Sequence[Item], doing: str) -> Iterator[Item]:
    """The items; while they are gone through, stderr says how many are done, as `following` has it."""
    with counting(doing, len(items)) as count:
        for item in items:
            yield item
            count()


@contextlib.contextmanager
def counting(doing: str, total: float) -> Iterator[Callable[..., None]]:
    """As `following`; gives what is to be called after each step, as `on_token` of `generate`, with any arguments."""
    done = 0

    def count(*_: object) -> None:
        nonlocal done
        done += 1

    with following(doing, total, lambda: done):
        yield count


@contextlib.contextmanager
def following(doing: str, total: float = math.inf, done: Callable[[], float] = lambda: 0) -> Iterator[None]:
    """Within it stderr says how far something is: a bar on a terminal, gone at the end, elsewhere a line every `EVERY`.

    One thing is followed at a time: within it the steps of a step say nothing, and neither does any process but the
    first. stdout is left alone.

    Args:
        doing: what is done.
        total: of how many steps; without it there is nothing to count, and no time left is told.
        done: how many of them are done so far; it is asked by another thread.
    """
    if getattr(rank_zero_only, "rank", 0) or not _followed.acquire(blocking=False):
        yield
        return
    over, pace = threading.Event(), Pace()
    console = Console(stderr=True)
    target = _draw if console.is_terminal else _print
    teller = threading.Thread(target=target, args=(console, over, pace, doing, total, done), daemon=True)
    teller.start()
    try:
        yield
    finally:
        over.set()
        teller.join()
        _followed.release()


#: Held while something is followed.
_followed = threading.Lock()


def _draw(
    console: Console, over: threading.Event, pace: Pace, doing: str, total: float, done: Callable[[], float]
) -> None:
    if over.wait(PATIENCE):
        return
    columns = TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.fields[said]}")
    # whose bars would take what is meant for stdout to stderr
    with Progress(*columns, console=console, transient=True, redirect_stdout=False) as bar:
        text = labels.with_label(doing, labels.current())
        task = bar.add_task(text, total=total if total < math.inf else None, said="")
        while not over.wait(LOOK):
            bar.update(task, completed=done(), said=_count(pace, total, done()))


def _print(
    console: Console, over: threading.Event, pace: Pace, doing: str, total: float, done: Callable[[], float]
) -> None:
    while not over.wait(EVERY):
        text = f"{doing}: {_count(pace, total, done())}"
        print(labels.with_label(text, labels.current()), file=sys.stderr, flush=True)


def _count(pace: Pace, total: float, done: float) -> str:
    """`3/8 (12 s, about 20 s left)`, or the seconds alone where nothing is counted."""
    said = pace.say(done, total)
    return f"{done:.0f}/{total:.0f} ({said})" if total < math.inf else said


# --- within a Trainer -------------------------------------------------------------------------------------------


class RichProgress(RichProgressBar):
    """Lightning's rich progress bar, on stderr, that knows the end of a run of so many steps, also a continued one."""

    def __init__(self) -> None:
        super().__init__(console_kwargs={"stderr": True})

    @property
    def total_train_batches(self) -> int | float:
        trainer = self.trainer
        if trainer.max_steps < 0:
            return trainer.num_training_batches
        batches = trainer.fit_loop.epoch_loop.batch_progress.total.processed % trainer.num_training_batches
        left = (trainer.max_steps - trainer.global_step) * trainer.accumulate_grad_batches
        return min(trainer.num_training_batches, batches + left)

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, pl_module)
        return {name: value for name, value in metrics.items() if name != "v_num"}

    def _get_train_description(self, current_epoch: int) -> str:
        return self._labelled(f"Epoch {current_epoch}").ljust(len(self.validation_description))

    @property
    def sanity_check_description(self) -> str:
        return self._labelled(super().sanity_check_description)

    @property
    def validation_description(self) -> str:
        return self._labelled(super().validation_description)

    @property
    def test_description(self) -> str:
        return self._labelled(super().test_description)

    @property
    def predict_description(self) -> str:
        return self._labelled(super().predict_description)

    def _labelled(self, text: str) -> str:
        return labels.with_label(text, labels.label_of(self.trainer.lightning_module))


class PlainProgress(ProgressBar):
    """Lines on stderr, for where no terminal is: after each validation of a run, and every ten seconds."""

    def __init__(self) -> None:
        super().__init__()
        self._enabled, self._training, self._looking = True, Pace(), Pace()

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    # --- training

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._training = Pace(trainer.global_step)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        if self._training.is_due():
            self._say_step(trainer, pl_module, "")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        values = ", ".join(f"{name} {float(value):.4f}" for name, value in trainer.progress_bar_metrics.items())
        self._say_step(trainer, pl_module, f": {values}" if values else "")

    def _say_step(self, trainer: L.Trainer, pl_module: L.LightningModule, values: str) -> None:
        step, last = trainer.global_step, _last_step(trainer)
        end = f"/{last:.0f}" if last < math.inf else ""
        self._say(f"step {step}{end}{values} ({self._training.say(step, last)})", pl_module)

    # --- looking at a trained model

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_validation_start(trainer, pl_module)
        self._looking = Pace()

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_test_start(trainer, pl_module)
        self._looking = Pace()

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_predict_start(trainer, pl_module)
        self._looking = Pace()

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        self._say_batch("validation", pl_module, trainer.num_val_batches, *args)

    def on_test_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        self._say_batch("test", pl_module, trainer.num_test_batches, *args)

    def on_predict_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        self._say_batch("prediction", pl_module, trainer.num_predict_batches, *args)

    def _say_batch(
        self,
        what: str,
        pl_module: L.LightningModule,
        totals: Sequence[float],
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._looking.is_due():
            done, total = batch_idx + 1, totals[dataloader_idx]
            end = f"/{total:.0f}" if total < math.inf else ""
            self._say(f"{what}: batch {done}{end} ({self._looking.say(done, total)})", pl_module)

    def _say(self, line: str, pl_module: L.LightningModule) -> None:
        if self._enabled:
            print(labels.with_label(line, labels.label_of(pl_module)), file=sys.stderr, flush=True)


def _last_step(trainer: L.Trainer) -> float:
    """The optimizer step that a trainer's limits end at; infinite without any."""
    last = trainer.max_steps if trainer.max_steps >= 0 else math.inf
    batches, epochs = trainer.num_training_batches, trainer.max_epochs
    if epochs is not None and epochs >= 0 and batches < math.inf:
        last = min(last, epochs * math.ceil(batches / trainer.accumulate_grad_batches))
    return last
