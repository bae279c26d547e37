"""Tapes of one call, spread over processes of this machine by PennyLane's executors (`pennylane.concurrency`).

The processes start at the first call and stay until the program ends, so that they load PennyLane once. Each opens the
device anew. They are started by `spawn`: a script of one's own needs the usual `if __name__ == "__main__":`.
"""

import atexit
import functools
import pickle
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from pennylane.concurrency.executors import RemoteExec, create_executor
from pennylane.tape import QuantumScript


def spread(state: bytes, method: str, tapes: Sequence[QuantumScript], processes: int) -> list[Any]:
    """What a method of a runner gives for tapes, each process working on as many of them, in their order.

    Args:
        state: the pickled runner.
        method: the name of one that takes a list of tapes and gives a result for each.
        tapes: at least one.
        processes: how many work at a time.

    Raises:
        RuntimeError: if a process has died.
    """
    shares = min(processes, len(tapes))
    bounds = [len(tapes) * share // shares for share in range(shares + 1)]
    parts = [(state, method, list(tapes[first:last])) for first, last in zip(bounds, bounds[1:], strict=False)]
    try:
        return [result for results in _pool(processes).starmap(_run, parts) for result in results]
    except BrokenProcessPool:
        _pool.cache_clear()  # the next call has new ones
        raise RuntimeError(
            f"one of the {processes} processes that run circuits has died; if this is a script, start it under "
            'if __name__ == "__main__":, and else give them less to do at a time, as with a smaller batch'
        ) from None


@functools.cache
def _pool(processes: int) -> RemoteExec:
    pool = create_executor("cf_procpool", max_workers=processes, persist=True)
    atexit.register(pool.shutdown)  # left to its end with the interpreter, it prints a traceback
    return pool


def _run(state: bytes, method: str, tapes: list[QuantumScript]) -> list[Any]:
    """In the other process."""
    return list(getattr(_opened(state), method)(tapes))


@functools.lru_cache(maxsize=64)
def _opened(state: bytes) -> Any:
    return pickle.loads(state)
