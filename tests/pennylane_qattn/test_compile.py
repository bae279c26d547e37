"""`torch.compile` of every registered mechanism, in a process of its own: shape-checked signatures do not compile."""

import subprocess
import sys

import pytest

from pennylane_qattn import ATTENTION, VALUES

SCRIPT = """
import sys
import torch
from pennylane_qattn import build_attention

torch.manual_seed(0)
x = torch.randn(2, 7, 12)
seen = torch.arange(7) >= torch.tensor([[0], [3]])
for case in sys.argv[1:]:
    name, values, heads = case.split(":")
    torch._dynamo.reset()
    module = build_attention(name, 12, int(heads), 7, **({"values": values} if values else {}))
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    options = {"key_padding_mask": ~seen} if heads == "1" else {}
    out, expected = compiled(x, **options), module(x, **options)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    wanted = torch.autograd.grad(expected.square().sum(), list(module.parameters()))
    gradients = torch.autograd.grad(out.square().sum(), list(module.parameters()))
    torch.testing.assert_close(gradients, wanted, rtol=1e-4, atol=1e-5)
    print(case)
"""


@pytest.mark.timeout(600)
def test_compiles_in_one_graph():
    cases = [f"{name}::3" for name in ATTENTION] + [f"scaled-dot:{values}:3" for values in VALUES]
    cases += ["gaussian::1", "classical::1"]  # one head, and tokens that nobody sees
    command = [sys.executable, "-c", SCRIPT, *cases]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == cases
