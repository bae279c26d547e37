"""Kernels for the CPU, compiled by Numba where it is installed (the extra `fast`).

Torch has no fused operation for what a circuit ends with, many short signed sums of products of amplitudes, and writes
every product out. A kernel keeps a few tokens in the processor's cache, one per lane of its vector unit. Without Numba,
on other processors, under `torch.compile` and under `torch.func`, torch computes the same values by itself.
"""

import hashlib
import inspect
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

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
_DTYPES = (torch.float32, torch.float64)
#: Set to 0 in the environment, kernels are left out.
SWITCH = "QATTN_KERNELS"


def serve(*tensors: Tensor) -> bool:
    """Whether kernels are there, and can work on these: float32 or float64 in the CPU's memory, no transformed call."""
    if numba is None or is_transformed() or (SWITCH in os.environ and os.environ[SWITCH] == "0"):
        return False
    for t in tensors:
        if not (t.is_cpu and t.dtype in _DTYPES and is_plain(t)):
            return False
    return True


def compiled(function: Callable) -> Callable:
    """A kernel of a function `(*arguments, first, last)` that works on tokens `first` to `last`."""
    if numba is None:
        return function
    # tests wrap every function of the package to check its shapes; the compiler wants the function itself
    plain = inspect.unwrap(function)
    # sums may be added up in any order, several at a time
    options = {"nogil": True, "error_model": "numpy", "fastmath": {"reassoc", "contract"}}
    try:
        kernel = numba.njit(cache=True, **options)(plain)
    except RuntimeError as error:  # no folder to keep machine code in: each process compiles its own
        if "no locator available" not in str(error):
            raise
        return numba.njit(**options)(plain)
    # Numba looks for changes in the kernel's own file alone, and a kernel has parts from other files in it.
    kept = getattr(getattr(kernel, "_cache", None), "_cache_file", None)
    if not hasattr(kept, "_source_stamp"):  # a Numba that cannot be told: nothing is kept that might be stale
        return numba.njit(**options)(plain)
    kept._source_stamp = kept._source_stamp, _digest()
    return kernel


@cache
def _digest() -> str:
    """Of this file and of all that have parts of kernels, which they mark by what is defined here."""
    digest, marks = hashlib.sha256(Path(__file__).read_bytes()), (b"@inlined", b"@compiled", b"@kernels.compiled")
    for path in sorted(Path(__file__).parent.glob("*.py")):
        source = path.read_bytes()
        if any(mark in source for mark in marks):
            digest.update(source)
    return digest.hexdigest()


def inlined(function: Callable) -> Callable:
    """A part of kernels, written out where they call it."""
    return function if numba is None else numba.njit(inline="always")(inspect.unwrap(function))


def run(
    kernel: Callable, number: int, *arguments: Tensor | np.ndarray | np.generic | int | tuple, each: int = 1
) -> None:
    """Runs a kernel on so many tokens, or sequences of `each` tokens, divided among as many threads as torch has.

    Each thread writes to its own tokens, so their number does not matter to the result.
    """
    plain = [a.detach().numpy() if isinstance(a, Tensor) else a for a in arguments]
    if number * each < 2 * _SHARE:
        kernel(*plain, 0, number)
        return
    parts = max(1, min(torch.get_num_threads(), number, number * each // _SHARE))
    step = max(1, _STEP // each)
    edges = [number * part // parts // step * step for part in range(parts)] + [number]
    others = [_threads(parts - 1).submit(kernel, *plain, *edges[i : i + 2]) for i in range(1, parts)]
    kernel(*plain, *edges[:2])
    for other in others:
        other.result()


#: The threads beside the caller's, and how many they are.
_pool: tuple[int, ThreadPoolExecutor] | None = None


def _threads(number: int) -> ThreadPoolExecutor:
    """That many threads or more: one pool, which a larger one replaces. The threads of a pool that nobody holds end."""
    global _pool
    pool = _pool  # read once, since callers may be threads too
    if pool is None or pool[0] < number:
        _pool = pool = number, ThreadPoolExecutor(number, thread_name_prefix="qattn-kernel")
    return pool[1]


def _forget_threads() -> None:
    global _pool
    _pool = None


if hasattr(os, "register_at_fork"):  # a child has the pool and none of its threads, and would wait for them for ever
    os.register_at_fork(after_in_child=_forget_threads)
