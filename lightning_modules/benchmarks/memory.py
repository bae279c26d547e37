"""Peak memory of a training step: what it takes beyond what was there before it, and in all.

On a GPU torch's allocator knows. On a CPU the system knows, of a whole process, so the step runs in a fresh one: this
module, run as a program, reads what to run as JSON from stdin and writes the bytes to stdout. Before the step there are
the model, its gradients and the optimizer's state, from a smaller step, which also compiles and loads what is loaded
at first use.
"""

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from lightning_modules.benchmarks.models import Setup
from lightning_modules.timing import training_step

#: Linux forgets the highest mark of a process's memory when 5 is written here (proc(5)).
CLEAR, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
FORGET_PEAK = "5"
#: Windows of the step before: enough for every kernel to be called.
WARMED = 64
ROOT = Path(__file__).resolve().parents[2]
#: glibc gives larger blocks back as they are freed, so that holes between others are no part of what is measured.
AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": str(2**16)}


class Peak(NamedTuple):
    """The most memory that is taken at once, in bytes.

    Attributes:
        rise: beyond what was there before.
        whole: with that: on a CPU of the whole process, on a GPU of all its tensors.
    """

    rise: int
    whole: int


def peak_bytes(setup: Setup) -> tuple[Peak | None, str]:
    """The peak of a training step; or `None`, and why it is not known."""
    if setup.device == "cuda":
        return _peak_here(setup, _peak_on_gpu), ""
    if not CLEAR.exists():
        return None, "peak memory on a CPU is measured on Linux alone"
    paths = filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))
    run = subprocess.run(
        [sys.executable, "-m", __spec__.name],
        input=json.dumps({"threads": torch.get_num_threads(), "setup": setup.to_plain()}),
        env=os.environ | AT_ONCE | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )
    if run.returncode < 0:  # ended by the system, as when there is too little memory
        return None, f"the process of {setup.mechanism.name} was ended by signal {-run.returncode}"
    if run.returncode:
        lines = run.stderr.strip().splitlines() or ["no word of why"]
        raise RuntimeError(f"the process that measures memory failed: {lines[-1]}")
    return Peak(**json.loads(run.stdout)), ""


def _peak_here(setup: Setup, measure: Callable[[Callable[[], None]], Peak]) -> Peak:
    model, tokens = setup.model(), setup.tokens()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    with setup.precision():
        # compiled for one batch and then for another, it would be compiled for any, which takes more
        training_step(model, optimizer, tokens if setup.compile else tokens[:WARMED])
        return measure(lambda: training_step(model, optimizer, tokens))


def _peak_on_gpu(function: Callable[[], None]) -> Peak:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    most = torch.cuda.max_memory_allocated()
    return Peak(most - before, most)


def peak_of_process(function: Callable[[], None]) -> Peak:
    """How large this process is at the most while the function runs. On Linux."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc: what was freed goes back to the system
    if trim is not None:
        trim(0)
    CLEAR.write_text(FORGET_PEAK)
    before = _status("VmRSS")
    function()
    most = _status("VmHWM")
    return Peak(max(0, most - before), most)


def _status(name: str) -> int:
    fields = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return 1024 * int(fields[name].split()[0])


def main() -> None:
    """Measures a training step of what stdin describes."""
    given = json.load(sys.stdin)
    torch.set_num_threads(given["threads"])
    print(json.dumps(_peak_here(Setup.from_plain(given["setup"]), peak_of_process)._asdict()))


if __name__ == "__main__":
    main()
