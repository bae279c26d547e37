"""What several processes of one run need to end alike, to speak once, and to be told apart.

An error that every process has alike is told by the first of them, and the others end quietly. One that a process has
alone ends all of them: the others notice that it is gone.
"""

import re
import signal
from collections.abc import Sequence
from typing import Any, TypeVar

import lightning as L
import torch
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_only

#: What gloo and NCCL say where a process that they wait for is gone.
_GONE = re.compile(r"gloo|nccl|closed by peer|reset by peer|broken pipe", re.IGNORECASE)


_Error = TypeVar("_Error", bound=BaseException)


class LostProcessError(RuntimeError):
    """Another process of the run has ended."""


def of_all_processes(error: _Error) -> _Error:
    """The error, marked as one that every process of the run raises at the same point."""
    error.of_all_processes = True  # type: ignore[attr-defined]
    return error


def is_left_to_the_first(error: BaseException) -> bool:
    """Whether another process tells of this error."""
    return bool(rank_zero_only.rank) and getattr(error, "of_all_processes", False)


def speaker() -> str:
    """What an error line of this process begins with, if it is not the first one."""
    return f"process {rank_zero_only.rank}: " if rank_zero_only.rank else ""


def gather(value: Any) -> list[Any]:
    """The values of all processes in their order, on each of them; of this one alone if there are no others."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def in_turns(shares: Sequence[Sequence[Any]]) -> list[Any]:
    """One list of what several processes have shared out in turns: the first of each, the second of each, ..."""
    whole: list[Any] = [None] * sum(map(len, shares))
    for rank, share in enumerate(shares):
        whole[rank :: len(shares)] = share
    return whole


def is_sharded(trainer: L.Trainer) -> bool:
    """Whether each process holds a part of every weight, and the whole of it only while a block runs."""
    return isinstance(trainer.strategy, FSDPStrategy)


def end_others(trainer: L.Trainer) -> None:
    """Ends the processes that this one has started, which may be waiting for it and would for a long time."""
    launcher = trainer.strategy.launcher
    if hasattr(launcher, "procs"):
        launcher.kill(signal.SIGKILL)


def as_lost(error: BaseException, trainer: L.Trainer) -> LostProcessError | None:
    """What to say instead, if an error only tells that another process is gone."""
    if trainer.world_size == 1 or not isinstance(error, RuntimeError) or not _GONE.search(str(error)):
        return None
    return LostProcessError(
        f"another of the {trainer.world_size} processes has ended at step {trainer.global_step}, which ends the run; "
        "its own error, if it had time for one, tells why"
    )
