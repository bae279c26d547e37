"""On a CUDA device, where there is one: what the CPU gives, with every mechanism, and the command line.

bash scripts/test.sh tests/test_cuda.py
"""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

from lightning_modules import cli
from lightning_modules.checkpoints import read_checkpoint
from pennylane_qattn import ATTENTION, Circuit, CircuitLayer, Execution, build_attention
from pennylane_qattn.causality import certify
from pennylane_qattn.features import CircuitFeatureMap

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

EMBED, HEADS, BLOCK, BATCH, SEQ = 15, 3, 11, 2, 7
#: Registered names, and forms that take another way through the code.
VARIANTS = {
    **{name: (name, {}) for name, mechanism in ATTENTION.items() if not mechanism.is_published},
    "qisa-split": ("qisa", {"split": True}),
    "qisa-angle": ("qisa", {"encoding": "angle", "split": True}),
    "qisa-absorbed-split": ("qisa-absorbed", {"split": True}),
    "gaussian-quadratic": ("gaussian", {"values": "quadratic"}),
    "gaussian-mixed": ("gaussian", {"values": "mixed-circuit", "bias": True, "head_dim": 7}),
    "scaled-dot-pairs": ("scaled-dot", {"span": 2, "values": "linear", "split": True}),
}
TOLERANCES = {torch.float64: 1e-11, torch.float32: 2e-5}


@pytest.fixture(params=VARIANTS)
def make(request):
    name, options = VARIANTS[request.param]

    def build():
        torch.manual_seed(5)
        return build_attention(name, EMBED, HEADS, BLOCK, **options)

    return build


@pytest.fixture
def x(rng):
    return torch.randn(BATCH, SEQ, EMBED, dtype=torch.float64, generator=rng)


def value_and_gradients(module, x):
    x = x.clone().requires_grad_()
    out = module(x)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=out.device).view_as(out)
    named = {name: p for name, p in module.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad((out * weights).sum(), (x, *named.values()))
    return {"out": out.detach(), "x": gradients[0], **dict(zip(named, gradients[1:], strict=True))}


def test_values_and_gradients_are_those_of_the_cpu(make, dtype, x):
    module, x = make().to(dtype), x.to(dtype)
    expected = value_and_gradients(module, x)
    found = value_and_gradients(copy.deepcopy(module).cuda(), x.cuda())
    assert all(t.is_cuda and t.dtype == dtype for t in found.values())
    for name, value in found.items():
        scale = expected[name].abs().max().clamp(min=1).item()
        tolerance = TOLERANCES[dtype] * scale
        torch.testing.assert_close(
            value.cpu(), expected[name], rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_many_tokens(make, rng):
    """Enough of them for blocks."""
    module = make().double()
    x = torch.randn(67, BLOCK, EMBED, dtype=torch.float64, generator=rng)
    with torch.no_grad():
        expected = module(x)
        torch.testing.assert_close(module.cuda()(x.cuda()).cpu(), expected, rtol=1e-11, atol=1e-11)


def test_cached_equals_uncached(make, dtype, x):
    module, x = make().to("cuda", dtype).eval(), x.to("cuda", dtype)
    cache = module.new_cache(BATCH)
    with torch.no_grad():
        pieces = [module(part, cache=cache) for part in x.split([3, 1, 1, 2], dim=1)]
        torch.testing.assert_close(torch.cat(pieces, dim=1), module(x), rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])


def test_there_and_back(make, x):
    """What is derived from weights follows them, and is never the other device's."""
    module = make().double()
    with torch.no_grad():
        before = module(x)
        there = module.cuda()(x.cuda()).cpu()
        assert torch.equal(module.cpu()(x), before)
        torch.testing.assert_close(there, before, rtol=1e-11, atol=1e-11)


def test_autocast_keeps_angles_in_float32(make, x):
    module, x = make().cuda(), x.float().cuda()
    expected = module(x)
    with torch.autocast("cuda", torch.bfloat16):
        out = module(x)
        out.float().square().sum().backward()
    assert all(p.dtype == torch.float32 for p in module.parameters())
    assert all(p.grad.isfinite().all() for p in module.parameters() if p.requires_grad)
    torch.testing.assert_close(out.float(), expected, rtol=0.1, atol=0.1)


def test_same_numbers_twice(make, x):
    """Sums are added up in one order, so that a run can be repeated bit by bit."""
    module, x = make().cuda(), x.float().cuda()
    first, second = (value_and_gradients(module, x) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("is_offloaded", [True, False])
def test_hooks_for_saved_tensors_may_copy_them(make, is_offloaded, x):
    """What is saved comes back in memory of its own, side by side, whatever strides it had."""
    module, x = make().double().cuda(), x.cuda()
    expected = value_and_gradients(module, x)
    repacked = torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: tensor.clone(memory_format=torch.contiguous_format), lambda tensor: tensor
    )
    with torch.autograd.graph.save_on_cpu(pin_memory=True) if is_offloaded else repacked:
        found = value_and_gradients(module, x)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-11, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


def test_negative_views(make):
    """Kernels of a device read memory, where such a view has the other sign."""
    module = make().double().cuda()
    x = torch.randn(BATCH, SEQ, EMBED, dtype=torch.complex128, device="cuda").conj().imag
    upstream = torch.randn(BATCH, SEQ, EMBED, dtype=torch.complex128, device="cuda").conj().imag
    assert x.is_neg() and upstream.is_neg()
    parameters = [p for p in module.parameters() if p.requires_grad]
    views, plain = (module(each) for each in (x, x.resolve_neg()))
    torch.testing.assert_close(views, plain, rtol=1e-11, atol=1e-11)
    found = torch.autograd.grad(views, parameters, upstream)
    wanted = torch.autograd.grad(plain, parameters, upstream.resolve_neg())
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)


def test_words_that_are_written_into(x):
    """What is derived from words on the device follows them, and reads them only when they have changed."""
    feature_map = CircuitFeatureMap(EMBED, HEADS, 5).double().cuda()
    before = feature_map(x.cuda())
    executor = feature_map.executor
    assert feature_map._mark is not None and torch.equal(feature_map(x.cuda()), before)
    assert feature_map.executor is executor
    feature_map.word_codes.copy_(feature_map.word_codes % 3 + 1)
    after = feature_map(x.cuda())
    torch.testing.assert_close(after.cpu(), copy.deepcopy(feature_map).cpu()(x), rtol=1e-11, atol=1e-11)
    assert not torch.allclose(after, before)


@pytest.mark.parametrize("name", ["classical", "qisa", "gaussian", "grover"])
def test_certified(name):
    module = build_attention(name, EMBED, HEADS, BLOCK).cuda()
    certificate = certify(module, embed_dim=EMBED, length=SEQ)
    assert certificate.passes, str(certificate)
    assert all(p.is_cuda for p in module.parameters())


SCRIPT = """
import torch
from pennylane_qattn import build_attention

x = torch.randn(67, 7, 12, generator=torch.Generator().manual_seed(0)).cuda()
for name, heads in (("qisa", 3), ("gaussian", 3), ("overlap", 3), ("gaussian", 1), ("qisa", 1)):
    torch.manual_seed(0)
    torch._dynamo.reset()
    module = build_attention(name, 12, heads, 7).cuda()
    out, expected = torch.compile(module, fullgraph=True)(x), module(x)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    wanted = torch.autograd.grad(expected.square().sum(), list(module.parameters()))
    gradients = torch.autograd.grad(out.square().sum(), list(module.parameters()))
    torch.testing.assert_close(gradients, wanted, rtol=1e-3, atol=1e-3)
"""


def test_compiled():
    """In a process of its own: shape-checked signatures do not compile."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize(
    "execution",
    [
        Execution(executor="qnode", device="default.qubit", diff_method="backprop"),
        Execution(executor="qnode", device="default.qubit", diff_method="parameter-shift"),
        Execution(executor="qnode", device="lightning.qubit", diff_method="adjoint"),
    ],
    ids=["backprop", "parameter-shift", "lightning-adjoint"],
)
def test_circuits_on_devices(execution, rng):
    """Simulators of the CPU serve models of the GPU: values and gradients come back to it."""
    feature_map = CircuitFeatureMap(5, 2, 4).double()
    x = torch.randn(1, 3, 5, dtype=torch.float64, generator=rng)
    expected = value_and_gradients(feature_map, x)
    feature_map.set_execution(execution)
    found = value_and_gradients(feature_map.cuda(), x.cuda())
    for name, value in found.items():
        assert value.is_cuda, name
        torch.testing.assert_close(value.cpu(), expected[name], rtol=1e-8, atol=1e-8)


def test_a_layer_in_a_model(rng):
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(3, 4), CircuitLayer(Circuit(4, ("ZI", "XX", "IY"))), nn.Linear(3, 1)).double()
    x = torch.randn(40, 3, dtype=torch.float64, generator=rng)
    expected = value_and_gradients(model, x)
    for name, value in value_and_gradients(model.cuda(), x.cuda()).items():
        torch.testing.assert_close(value.cpu(), expected[name], rtol=1e-11, atol=1e-11)


# --- the command line -------------------------------------------------------------------------------------------

TEXT = "the quick brown fox jumps over the lazy dog. " * 12


@pytest.fixture
def fit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    options = [
        *("--data.corpus", "text.txt", "--data.batch_size", "4", "--data.eval_windows", "7"),
        *("--model.attention", "qisa", "--model.num_layers", "2", "--model.embed_dim", "8"),
        *("--model.block_size", "5", "--model.dropout", "0.3", "--model.schedule", "constant"),
        *("--trainer.max_steps", "15", "--trainer.val_check_interval", "5", "--trainer.log_every_n_steps", "1"),
        *("--trainer.accelerator", "gpu", "--trainer.devices", "1", "--checkpoint_every", "5"),
    ]
    deterministic = torch.are_deterministic_algorithms_enabled()
    yield lambda *more: cli.main(["fit", *options, *more])
    torch.use_deterministic_algorithms(deterministic)


def weights(path):
    return read_checkpoint(path)["state_dict"]


def test_a_run_is_continued(fit):
    """A run in two halves, dropout included, ends where one in one piece does; and the CPU reads what it wrote."""
    assert fit("--run", "whole") == 0
    assert fit("--run", "half", "--trainer.max_steps", "10") == 0
    assert fit("--run", "half", "--ckpt_path", "last") == 0
    whole, half = (weights(f"runs/{name}/checkpoints/last.ckpt") for name in ("whole", "half"))
    assert whole.keys() == half.keys() and all(torch.equal(whole[name], half[name]) for name in whole)
    assert cli.main(["validate", "--ckpt_path", "runs/whole", "--trainer.accelerator", "cpu"]) == 0
    assert cli.main(["generate", "--checkpoint", "runs/whole", "--prompt", "the ", "--device", "cuda"]) == 0


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_mixed_precision(fit, precision):
    assert fit("--run", precision, "--trainer.precision", precision) == 0
    assert all(value.isfinite().all() for value in weights(f"runs/{precision}/checkpoints/last.ckpt").values())
