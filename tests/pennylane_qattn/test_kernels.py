"""What runs the kernels of the CPU: without a cache, on views, and in threads."""

import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from pennylane_qattn import CircuitFeatureMap, QuadraticFeatureMap, build_attention, kernels
from pennylane_qattn.augmentation import Layout, augment

pytestmark = pytest.mark.skipif(kernels.numba is None, reason="Numba is not installed")

SCRIPT = """
import numba.core.caching as caching
import torch

def refuse(self):
    raise OSError("read-only file system")

for kind in vars(caching).values():
    if isinstance(kind, type) and hasattr(kind, "ensure_cache_path"):
        kind.ensure_cache_path = refuse

from pennylane_qattn import kernels
from pennylane_qattn.encoding import normalise

assert kernels.serve(torch.ones(1))
torch.testing.assert_close(normalise(torch.tensor([[3.0, 4.0]])), torch.tensor([[0.6, 0.8]]))
"""


def test_no_folder_for_machine_code():
    """As in a read-only image without a home directory: kernels are compiled, and not kept."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-3000:]


OWN = """
import numpy as np
from pennylane_qattn.kernels import compiled
from pennylane_qattn.simd import dot, splat

@compiled
def square(a, out, first, last):
    out[0] = dot(a, 0, a, 0, splat(a.dtype.type(0)))

out = np.zeros(1)
square(np.array([[3.0, 4.0]]), out, 0, 1)
print(out[0], sum(square.stats.cache_hits.values()))
"""


def test_a_change_in_a_part_of_kernels_is_seen(tmp_path):
    """Machine code that is kept is that of the files as they are, though the kernel's own has not changed."""
    package = tmp_path / "pennylane_qattn"
    shutil.copytree(Path(kernels.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "own.py").write_text(OWN)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}

    def run():
        command = [sys.executable, str(tmp_path / "own.py")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=250, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout.split()

    assert [run(), run()] == [["25.0", "0"], ["25.0", "1"]]
    part = package / "simd.py"
    source = part.read_text()
    assert source.count("return product\n") == 1
    part.write_text(source.replace("return product\n", "return 2 * product\n"))
    assert run() == ["50.0", "0"]


def negative_view(shape, rng):
    """A view that stands for the negatives of what its memory holds."""
    view = torch.randn(*shape, dtype=torch.complex128, generator=rng).conj().imag
    assert view.is_neg()
    return view


@pytest.mark.parametrize("kind", [CircuitFeatureMap, QuadraticFeatureMap])
def test_negative_views(kind, rng):
    torch.manual_seed(0)
    feature_map = kind(8, 2, 5).double()
    x = negative_view((2, 7, 8), rng)
    values = feature_map(x)
    torch.testing.assert_close(values, feature_map(x.resolve_neg()), rtol=1e-12, atol=1e-12)
    parameters = list(feature_map.parameters())
    upstream = negative_view(values.shape, rng)
    found = torch.autograd.grad(values, parameters, upstream, retain_graph=True)
    wanted = torch.autograd.grad(values, parameters, upstream.resolve_neg())
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_negative_views_are_augmented(rng):
    layout = Layout(norm=0, ones=(1,), width=7)
    x, factor = negative_view((3, 2, 4, 5), rng), negative_view((2,), rng)
    found, wanted = augment(x, factor, -1.0, layout), augment(x.resolve_neg(), factor.resolve_neg(), -1.0, layout)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["qisa", "gaussian", "ngram", "qisa-absorbed"])
def test_tensors_without_memory_know_their_shapes(name):
    """`FakeTensorMode` asks what a model would take; a kernel would read memory that is not there."""
    attention = build_attention(name, 8, 2, 16)
    with FakeTensorMode(allow_non_fake_inputs=True):
        out = attention(torch.randn(2, 5, 8))
        out.sum().backward()
        cache = attention.new_cache(2)
        with torch.no_grad():
            steps = [attention(torch.randn(2, 1, 8), cache=cache) for _ in range(3)]
    assert isinstance(out, FakeTensor) and out.shape == (2, 5, 8)
    assert all(isinstance(step, FakeTensor) and step.shape == (2, 1, 8) for step in steps)


def threads_of_kernels():
    return [thread for thread in threading.enumerate() if thread.name.startswith("qattn-kernel")]


def test_one_pool_grows(monkeypatch):
    """Whatever numbers of threads are asked for, the largest pool is left, and each token is done once."""
    monkeypatch.setattr(kernels, "_pool", None)

    def work(counts, first, last):
        together.wait(60)  # so that every part needs a thread of its own
        counts[first:last] += 1

    before = set(threads_of_kernels())
    for parts in (2, 3, 5, 2, 4):
        monkeypatch.setattr(torch, "get_num_threads", lambda parts=parts: parts)
        counts, together = torch.zeros(5000), threading.Barrier(parts)
        kernels.run(work, 5000, counts)
        assert (counts == 1).all()
    assert kernels._pool[0] == 4
    until = time.monotonic() + 20
    while len(left := set(threads_of_kernels()) - before) > 4 and time.monotonic() < until:
        time.sleep(0.01)
    assert len(left) == 4


def test_callers_may_be_threads(monkeypatch):
    """A pool that another caller has replaced still does what it was given."""
    monkeypatch.setattr(kernels, "_pool", None)
    failures = []

    def call():
        for parts in range(1, 30):
            done = []
            pool = kernels._threads(parts)
            for each in [pool.submit(done.append, part) for part in range(parts)]:
                each.result()
            failures.extend(set(range(parts)) ^ set(done))

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not failures and kernels._pool[0] >= 29
