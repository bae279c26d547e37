"""What a benchmark runs on, in words and versions."""

import importlib.metadata
import os
import platform
from pathlib import Path

import torch

from pennylane_qattn import cuda_kernels, kernels

DEVICES = ("cpu", "cuda")


def use_device(name: str) -> None:
    """Gets a device ready: on a GPU float32 means float32, so TF32 is off.

    Raises:
        ValueError: if it is not there.
    """
    if name == "cuda":
        if not torch.cuda.is_available():
            raise ValueError("there is no device 'cuda' on this machine; leave --device out, or give --device cpu")
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def describe(device: str) -> dict[str, str | int]:
    """The machine as it is used now, by what each entry is."""
    found: dict[str, str | int] = {
        "processor": processor(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "device": "CPU" if device == "cpu" else torch.cuda.get_device_name(),
    }
    if device == "cuda":
        found["TF32"] = "on" if torch.backends.cuda.matmul.allow_tf32 else "off"
    return found | {
        "system": f"{platform.system()}, {platform.machine()}",
        "Python": platform.python_version(),
        "torch": str(torch.__version__),
        "PennyLane": importlib.metadata.version("pennylane"),
        "numba": "not installed" if kernels.numba is None else kernels.numba.__version__,
        "kernels": kernels_in_words(device),
    }


def kernels_in_words(device: str) -> str:
    """Whether kernels (`kernels.py` and `cuda_kernels.py` of `pennylane_qattn`) are in use, and why not."""
    library, there, serve = (
        ("numba", kernels.numba, kernels.serve)
        if device == "cpu"
        else ("triton", cuda_kernels.triton, cuda_kernels.serve)
    )
    if serve(torch.empty(0, device=device)):
        return "in use"
    return f"not in use, {library} is not installed" if there is None else f"not in use, {kernels.SWITCH}=0"


def processor() -> str:
    """The processor's name, as the system has it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # no Linux
        lines = []
    names = [value.strip() for key, _, value in (line.partition(":") for line in lines) if key.strip() == "model name"]
    return names[0] if names else platform.processor() or platform.machine()


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
