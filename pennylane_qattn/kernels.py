"""Kernels for the CPU, compiled by Numba where it is installed (the extra `fast`).

Torch has no fused operation for what a circuit ends with, many short signed sums of products of amplitudes, and writes
every product out. A kernel keeps a few tokens in the processor's cache, one per lane of its vector unit. Without Numba,
on other processors, under `torch.compile` and under `torch.func`, torch computes the same values by itself.
"""

import inspect
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from pennylane_qattn.transforms import is_plain, is_transformed

try:
    import numba
except ImportError:
    numba = None

#: Fewest tokens that are worth a thread of their own, and what its share is a multiple of.
_SHARE, _STEP = 512, 128
#: Set to 0 in the environment, kernels are left out.
SWITCH = "QATTN_KERNELS"


def serve(*tensors: Tensor) -> bool:
    """Whether kernels are there, and can work on these: float32 or float64 in the CPU's memory, no transformed call."""
    if numba is None or os.environ.get(SWITCH, "1") == "0" or is_transformed():
        return False
    return all(t.device.type == "cpu" and t.dtype in (torch.float32, torch.float64) and is_plain(t) for t in tensors)


def compiled(function: Callable) -> Callable:
    """A kernel of a function `(*arguments, first, last)` that works on tokens `first` to `last`."""
    if numba is None:
        return function
    # tests wrap every function of the package to check its shapes; the compiler wants the function itself
    plain = inspect.unwrap(function)
    # sums may be added up in any order, several at a time
    options = {"nogil": True, "error_model": "numpy", "fastmath": {"reassoc", "contract"}}
    try:
        return numba.njit(cache=True, **options)(plain)
    except RuntimeError as error:  # no folder to keep machine code in: each process compiles its own
        if "no locator available" not in str(error):
            raise
        return numba.njit(**options)(plain)


def inlined(function: Callable) -> Callable:
    """A part of kernels, written out where they call it."""
    return function if numba is None else numba.njit(inline="always")(inspect.unwrap(function))


def run(kernel: Callable, tokens: int, *arguments: Tensor | np.ndarray | int) -> None:
    """Runs a kernel on all tokens, divided among as many threads as torch has.

    Each thread writes to its own tokens, so their number does not matter to the result.
    """
    plain = [a.detach().numpy() if isinstance(a, Tensor) else a for a in arguments]
    parts = max(1, min(torch.get_num_threads(), tokens // _SHARE))
    edges = [tokens * part // parts // _STEP * _STEP for part in range(parts)] + [tokens]
    others = _pool.submit(parts - 1, lambda i: kernel(*plain, *edges[i + 1 : i + 3])) if parts > 1 else []
    kernel(*plain, *edges[:2])
    for other in others:
        other.result()


class _Pool:
    """The threads beside the caller's: one pool, which is replaced where a larger one is needed."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forgets the threads, without asking them."""
        self._lock, self._size = threading.Lock(), 0
        self._executor: ThreadPoolExecutor | None = None

    def submit(self, parts: int, work: Callable[[int], None]) -> list[Future]:
        """Starts `work(0)` to `work(parts - 1)`."""
        with self._lock:  # no other caller may shut down the pool in between
            if self._executor is None or self._size < parts:
                if self._executor is not None:
                    self._executor.shutdown(wait=False)  # what it has been given, it still does
                self._size, self._executor = parts, ThreadPoolExecutor(parts, thread_name_prefix="qattn-kernel")
            return [self._executor.submit(work, part) for part in range(parts)]


_pool = _Pool()
if hasattr(os, "register_at_fork"):  # a child has the pool and none of its threads, and would wait for them for ever
    os.register_at_fork(after_in_child=_pool.reset)
