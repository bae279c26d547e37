"""`torch.export` of folded attention: the program gives the same numbers, and needs nothing of this package."""

import subprocess
import sys

import pytest
import torch

from pennylane_qattn import ATTENTION, build_attention

LENGTH, WIDTH = 7, 8


# To check shapes against signatures would fix the size of the batch.
pytestmark = pytest.mark.usefixtures("without_shape_checks")


@pytest.mark.parametrize("name", list(ATTENTION))
def test_the_program_gives_the_same(name, rng):
    torch.manual_seed(0)
    attention = build_attention(name, embed_dim=WIDTH, num_heads=2, block_size=LENGTH).eval()
    x = torch.randn(5, LENGTH, WIDTH, generator=rng)
    shapes = {"x": {0: torch.export.Dim("batch", min=2)}}
    program = torch.export.export(attention, (x,), dynamic_shapes=shapes, strict=False)
    assert not [node for node in program.graph.nodes if "qattn" in str(node.target)]
    for batch in (5, 11):
        x = torch.randn(batch, LENGTH, WIDTH, generator=rng)
        torch.testing.assert_close(program.module()(x), attention(x), rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(torch.__version__ < (2, 7), reason="torch 2.6 reads no program again that holds complex numbers")
def test_the_program_needs_no_package(rng, tmp_path):
    attention = build_attention("qisa", embed_dim=WIDTH, num_heads=2, block_size=LENGTH).eval()
    x = torch.randn(2, LENGTH, WIDTH, generator=rng)
    torch.export.save(torch.export.export(attention, (x,), strict=False), tmp_path / "attention.pt2")
    torch.save({"x": x, "y": attention(x).detach()}, tmp_path / "numbers.pt")
    program = """
import sys, torch
numbers = torch.load("numbers.pt")
program = torch.export.load("attention.pt2")
torch.testing.assert_close(program.module()(numbers["x"]), numbers["y"])
assert not {"pennylane", "pennylane_qattn", "numba"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=tmp_path)
