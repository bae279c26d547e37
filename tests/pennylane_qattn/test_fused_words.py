"""Pauli words by gathers, as `torch.compile` takes them to a GPU, against dense matrices and against other ways."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from dense_reference import word_matrix

from pennylane_qattn.fused_words import FusedWords
from pennylane_qattn.observables import draw_words
from pennylane_qattn.word_tables import WordTable


@pytest.mark.parametrize("is_complex", [True, False])
@pytest.mark.parametrize("wires", [1, 2, 3, 5])
def test_equals_dense_matrices(wires, is_complex, dtype, close, rng):
    words = [(*draw_words(6, wires, seed, 0.4), "Z" * wires) for seed in range(2)]
    words[0] = (*words[0][:-1], words[0][0])  # one of them twice
    rows = 2**wires * (2 if is_complex else 1)
    states = torch.randn(2, rows, 9, dtype=dtype, generator=rng).requires_grad_()
    number = np.dtype(str(dtype).removeprefix("torch."))
    found = FusedWords([WordTable.of(head, is_complex, number) for head in words], rows, states)(states)
    real, imaginary = states.chunk(2, dim=1) if is_complex else (states, torch.zeros_like(states))
    state = torch.complex(real, imaginary)
    matrices = torch.as_tensor(np.array([[word_matrix(word) for word in head] for head in words])).to(state.dtype)
    expected = torch.einsum("hbn,hwbc,hcn->hnw", state.conj(), matrices, state).real
    close(found, expected.detach(), factor=10)
    upstream = torch.randn(found.shape, dtype=dtype, generator=rng)
    (ours,) = torch.autograd.grad(found, states, upstream)
    (wanted,) = torch.autograd.grad(expected, states, upstream)
    close(ours, wanted, factor=20)


SCRIPT = """
import torch
from pennylane_qattn import build_attention, measurement

measurement.FUSED = ("cpu",)
x = torch.randn(3, 7, 12, generator=torch.Generator().manual_seed(0))
for name, options in (("qisa", {}), ("qisa-absorbed", {"split": True})):
    torch.manual_seed(0)
    torch._dynamo.reset()
    module = build_attention(name, 12, 3, 7, **options)
    parameters = list(module.parameters())
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    out, expected = compiled(x), module(x)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    found, wanted = (torch.autograd.grad(each.square().sum(), parameters) for each in (out, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    maps = [m for m in module.modules() if hasattr(m, "words")]
    measured = [getattr(m, "_measurement", None) or m.executor._words for m in maps]
    assert measured and all(each._fused for each in measured), name  # there, so compiled calls took them
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_compiled_calls_take_them():
    """In a process of its own: shape-checked signatures do not compile."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
