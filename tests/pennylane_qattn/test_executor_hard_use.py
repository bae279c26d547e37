"""What people do to a model whose circuits run on devices: copy, pickle, cast, compile, transform, reload, misuse."""

import copy
import io
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.multiprocessing
from circuit_cases import WORKS, assert_all_close, device_params, one_line, qnodes, run, upstream_of
from torch import nn

from lightning_modules.gpt import GPT, GPTConfig
from pennylane_qattn import (
    ATTENTION,
    CircuitFeatureMap,
    Execution,
    StateFeatureMap,
    build_attention,
    set_execution,
)
from pennylane_qattn.executor import FoldedExecutor
from pennylane_qattn.qnode import QNodeExecutor

#: One of each way to run: backprop, adjoint here and there, values alone.
WAYS = [
    qnodes("default.qubit", "backprop"),
    qnodes("lightning.qubit", "adjoint"),
    qnodes("default.mixed", "parameter-shift"),
    qnodes("lightning.qubit", "spsa", shots=50, seed=3),
]
way = pytest.mark.parametrize("execution", WAYS, ids=lambda e: f"{e.device}-{e.diff_method}")
exact_way = pytest.mark.parametrize("execution", WAYS[:3], ids=lambda e: f"{e.device}-{e.diff_method}")


def feature_map(execution="folded", **options):
    torch.manual_seed(4)
    module = CircuitFeatureMap(3, 2, 1, words=["ZI", "XY", "IZ"], **options).double()
    set_execution(module, execution)
    return module


def tokens(count=3, seed=2):
    return torch.randn(1, count, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- copies


def saved_and_loaded(module):
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("execution, used", [*((execution, True) for execution in WAYS), (WAYS[3], False)])
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved_and_loaded])
def test_copies_run_alike(execution, used, clone):
    module = feature_map(execution)
    if used:
        run(module, tokens())
    other = clone(module)
    assert other.executor.plan == module.executor.plan
    if not (used and execution.shots):
        assert_all_close(run(other, tokens()), run(module, tokens()), 1e-12)
    # and are independent
    with torch.no_grad():
        other.weights += 1
    before = module.executor.meter.executions
    other(tokens())
    assert module.executor.meter.executions == before


def test_a_whole_attention_can_be_copied():
    torch.manual_seed(0)
    attention = build_attention("overlap", 5, 1, 4, values="circuit").double()
    x = torch.randn(2, 3, 5, dtype=torch.float64)
    expected = attention(x)
    set_execution(attention, qnodes("lightning.qubit"))
    for other in (copy.deepcopy(attention), pickle.loads(pickle.dumps(attention))):
        torch.testing.assert_close(other(x), expected, rtol=1e-9, atol=1e-9)


def test_a_spawned_worker_runs_it():
    x = tokens(2)
    modules = [feature_map(execution).requires_grad_(False) for execution in WAYS[:3]]
    context = torch.multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        values = [pool.apply(module, (x,)) for module in modules]
        jacobians = [pool.apply(torch.autograd.functional.jacobian, (module, x)) for module in modules]
    expected = feature_map()
    for value, jacobian in zip(values, jacobians, strict=True):
        torch.testing.assert_close(value, expected(x), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(jacobian, torch.autograd.functional.jacobian(expected, x), rtol=1e-9, atol=1e-9)


@pytest.fixture
def busy_threads():
    """Threads take turns as often as they can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.parametrize("execution", [qnodes("lightning.qubit"), qnodes("default.qubit", "adjoint")])
def test_threads_share_a_model(execution, busy_threads):
    module = feature_map(execution)
    inputs = [tokens(13, seed=seed) for seed in range(8)]
    expected = [run(copy.deepcopy(module), x)[:2] for x in inputs]

    def values_and_gradient(x):
        x = x.clone().requires_grad_()
        values = module(x)
        return values.detach(), torch.autograd.grad(values, x, upstream_of(values))[0]

    with ThreadPoolExecutor(4) as pool:
        for found, alone in zip(pool.map(values_and_gradient, inputs), expected, strict=True):
            assert_all_close(found, alone, 1e-12)


# ---------------------------------------------------------------- precision


def seen_by(module, monkeypatch):
    """The types of inputs and angles that reach the executor."""
    seen = []
    name = "states" if isinstance(module, StateFeatureMap) else "expectations"
    real = getattr(module.executor, name)
    monkeypatch.setattr(module.executor, name, lambda x, w: seen.append((x.dtype, w.dtype)) or real(x, w))
    return seen


@exact_way
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_casting_keeps_angles_in_float32_or_better(execution, dtype, monkeypatch):
    module = feature_map().float()
    before = module.weights.detach().clone()
    module = module.to(dtype)
    set_execution(module, execution)
    wide = torch.promote_types(dtype, torch.float32)
    assert module.weights.dtype == wide and torch.equal(module.weights.float(), before)
    seen = seen_by(module, monkeypatch)
    x = tokens().to(dtype).requires_grad_()
    values = module(x)
    values.float().sum().backward()
    assert values.dtype == dtype and x.grad.dtype == dtype and module.weights.grad.dtype == wide
    assert seen == [(wide, wide)]
    set_execution(module, "folded")
    # both are rounded once, at the end
    expected = module(x)
    torch.testing.assert_close(values, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


@exact_way
def test_half_and_bfloat16_by_name(execution):
    for cast in (nn.Module.half, nn.Module.bfloat16):
        module = cast(feature_map(execution))
        assert module.weights.dtype.itemsize >= 4
        assert module(tokens().half()).dtype == torch.float16


@exact_way
@pytest.mark.parametrize("cls", [CircuitFeatureMap, StateFeatureMap])
def test_autocast_does_not_reach_the_circuit(execution, cls, monkeypatch):
    if cls is StateFeatureMap and execution.device == "default.mixed":
        return
    torch.manual_seed(0)
    options = {"out_features": 3} if cls is CircuitFeatureMap else {}
    module = cls(3, 1, execution=execution, **options)
    linear = nn.Linear(3, 3)
    seen = seen_by(module, monkeypatch)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = linear(tokens().float())
        values = module(hidden)
        loss = values.float().square().sum()
    loss.backward()
    assert hidden.dtype == torch.bfloat16 and seen == [(torch.float32, torch.float32)]
    assert module.weights.grad.dtype == torch.float32 and linear.weight.grad.isfinite().all()
    expected = cls(3, 1, **options)
    expected.load_state_dict(module.state_dict())
    torch.testing.assert_close(values, expected(hidden), rtol=1e-2, atol=1e-5)


def test_inference_mode_and_training_after_it():
    for execution in WAYS[:3]:
        module = feature_map(execution)
        with torch.inference_mode():
            inside = module(tokens())
        values, _, by_angle = run(module, tokens())
        torch.testing.assert_close(inside.clone(), values, rtol=1e-12, atol=1e-12)
        assert by_angle.any()


# ---------------------------------------------------------------- transforms, derivatives of derivatives


COMPILING = """
import torch
from pennylane_qattn import CircuitFeatureMap, Execution, set_execution

torch.manual_seed(0)
x = torch.randn(1, 5, 3)
module = CircuitFeatureMap(3, 2, 3)
compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
folded = module(x)
torch.testing.assert_close(compiled(x), folded)
# switched, it must not go on folding in silence
for device in ("default.qubit", "lightning.qubit"):
    set_execution(module, Execution(executor="qnode", device=device))
    for fullgraph in (True, False):
        other = compiled if fullgraph else torch.compile(module, backend="eager")
        try:
            other(x)
        except Exception as error:
            lines = str(error).splitlines()
            assert any("torch.compile or torch.export; use executor folded" in line for line in lines), error
            assert fullgraph or len(lines) == 1, error
        else:
            raise AssertionError("compiled")
    torch.testing.assert_close(module(x), folded)
set_execution(module, "folded")
torch.testing.assert_close(compiled(x), folded)
print("done")
"""


def test_compile():
    # in a process of its own: shape-checked signatures do not compile
    done = subprocess.run([sys.executable, "-c", COMPILING], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and done.stdout == "done\n", done.stderr[-2000:]


@exact_way
def test_transforms_are_refused_in_one_line(execution):
    module, x = feature_map(execution), tokens()
    weights = {"weights": module.weights.detach()}
    for transform in (
        lambda: torch.func.vmap(module)(x[None]),
        lambda: torch.func.jacrev(module)(x),
        lambda: torch.func.grad(lambda w: torch.func.functional_call(module, w, (x,)).sum())(weights),
        lambda: torch.func.jvp(module, (x,), (x,)),
    ):
        with pytest.raises(RuntimeError, match="QNodes do not run under .*; use executor folded") as error:
            transform()
        one_line(error.value)


def test_folded_circuits_run_under_transforms():
    module, x = feature_map(), tokens()
    jacobian = torch.autograd.functional.jacobian(module, x)
    torch.testing.assert_close(torch.func.jacrev(module)(x), jacobian, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.func.jacfwd(module)(x), jacobian, rtol=1e-12, atol=1e-12)
    module(x).sum().backward()
    found = torch.func.grad(lambda w: torch.func.functional_call(module, {"weights": w}, (x,)).sum())(module.weights)
    torch.testing.assert_close(found, module.weights.grad, rtol=1e-12, atol=1e-12)


@exact_way
def test_functional_call_is_no_transform(execution):
    module, x = feature_map(execution), tokens()
    weights = (module.weights.detach() + 0.3).requires_grad_()
    values = torch.func.functional_call(module, {"weights": weights}, (x,))
    values.sum().backward()
    with torch.no_grad():
        module.weights += 0.3
    set_execution(module, "folded")
    module(x).sum().backward()
    torch.testing.assert_close(values, module(x), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(weights.grad, module.weights.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("encoding", ["amplitude", "angle"])
@pytest.mark.parametrize("by", ["inputs", "angles"])
@pytest.mark.parametrize("cls", [CircuitFeatureMap, StateFeatureMap])
def test_second_derivatives_are_right_or_refused(encoding, by, cls):
    # a part of a second derivative, through the normalising alone, would be a wrong number
    torch.manual_seed(4)
    options = {"words": ["ZI", "XY"], "out_features": 1} if cls is CircuitFeatureMap else {}
    module = cls(3 if encoding == "amplitude" else 2, 1, encoding=encoding, **options).double()
    x = tokens(1)[..., : module.embed_dim].clone().requires_grad_()

    def second(weigh):
        target = x if by == "inputs" else module.weights
        values = module(x)
        upstream = torch.linspace(1, 2, values.numel(), dtype=torch.float64).reshape(values.shape)
        (first,) = torch.autograd.grad(values, target, upstream.requires_grad_(weigh), create_graph=True)
        return torch.autograd.grad(first.square().sum(), target)[0]

    expected = second(False)
    set_execution(module, qnodes("default.qubit", "backprop"))
    torch.testing.assert_close(second(False), expected, rtol=1e-9, atol=1e-9)
    for method in ("adjoint", "parameter-shift"):
        set_execution(module, qnodes("default.qubit", method))
        for weigh in (False, True):
            with pytest.raises(RuntimeError, match="first derivatives only") as error:
                second(weigh)
            one_line(error.value)


@exact_way
def test_backward_twice_adds_up(execution):
    module = feature_map(execution)
    values = module(tokens())
    values.sum().backward(retain_graph=True)
    once = module.weights.grad.clone()
    values.sum().backward()
    torch.testing.assert_close(module.weights.grad, 2 * once, rtol=1e-12, atol=1e-12)


@exact_way
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(execution, reentrant):
    module = feature_map(execution)
    expected = run(module, tokens(), torch.ones(1, 2, 3, 3, dtype=torch.float64))
    x = tokens().requires_grad_()
    module.zero_grad()
    values = torch.utils.checkpoint.checkpoint(module, x, use_reentrant=reentrant)
    values.sum().backward()
    assert_all_close((values.detach(), x.grad, module.weights.grad), expected, 1e-9)


@exact_way
def test_angles_may_change_between_forward_and_backward(execution):
    # the gradient is that of the forward pass, or torch says that it cannot be had
    module = feature_map(execution)
    _, _, expected = run(module, tokens(), torch.ones(1, 2, 3, 3, dtype=torch.float64))
    module.zero_grad()
    values = module(tokens())
    with torch.no_grad():
        module.weights += 1
    try:
        values.sum().backward()
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
    else:
        torch.testing.assert_close(module.weights.grad, expected, rtol=1e-9, atol=1e-9)


# ---------------------------------------------------------------- what must not be touched, and what must not be fed


@way
def test_global_generators_are_left_alone(execution):
    module = feature_map()
    np.random.seed(1), torch.manual_seed(1)
    (state, position), of_torch = np.random.get_state()[1:3], torch.get_rng_state()
    set_execution(module, execution)
    run(module, tokens())
    copy.deepcopy(module)(tokens())
    assert torch.equal(torch.get_rng_state(), of_torch)
    assert (np.random.get_state()[1] == state).all() and np.random.get_state()[2] == position


@way
def test_inputs_are_left_alone(execution):
    module = feature_map(execution)
    x = tokens()
    weights = module.weights.detach().clone()
    run(module, x)
    assert torch.equal(x, tokens()) and torch.equal(module.weights, weights)


@way
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_inputs_and_angles_that_are_not_finite(execution, value):
    module = feature_map(execution)
    before = module.executor.meter.executions
    x = tokens(5)
    x[0, 3, 1] = value
    with pytest.raises(ValueError, match=r"inputs of a circuit hold NaN or infinity \(first in row 3\); look") as error:
        module(x)
    one_line(error.value)
    with torch.no_grad():
        module.weights[1, 0, 0, 0] = value
    with pytest.raises(ValueError, match="angles of a circuit hold NaN or infinity; lower the learning rate") as error:
        module(tokens())
    one_line(error.value)
    assert module.executor.meter.executions == before


def test_other_words_are_measured_after_loading(tmp_path):
    other = CircuitFeatureMap(3, 2, 1, words=["YX", "IX", "ZZ"]).double()
    expected = run(other, tokens())
    for execution in WAYS[:3]:
        module = feature_map(execution)
        meter = module.executor.meter
        module.load_state_dict(other.state_dict())
        assert module.executor.plan.device == execution.device and module.executor.meter is meter
        assert_all_close(run(module, tokens()), expected, 1e-9)
        assert meter.executions > 0


# ---------------------------------------------------------------- models, trained here and run there


def test_switching_back_and_forth():
    module = feature_map()
    expected = run(module, tokens())
    for execution in (WAYS[0], "folded", WAYS[1], WAYS[2], Execution(), WAYS[1]):
        set_execution(module, execution)
        assert isinstance(module.executor, FoldedExecutor if execution in ("folded", Execution()) else QNodeExecutor)
        assert_all_close(run(module, tokens()), expected, 1e-9)


@pytest.mark.parametrize("name", ATTENTION)
def test_parameters_do_not_know_the_execution(name):
    torch.manual_seed(0)
    attention = build_attention(name, 6, 2, 4)
    before = {key: (value.shape, value.dtype) for key, value in attention.state_dict().items()}
    values = {key: value.clone() for key, value in attention.state_dict().items()}
    for execution in WAYS[:2]:
        set_execution(attention, execution)
        after = attention.state_dict()
        assert {key: (value.shape, value.dtype) for key, value in after.items()} == before
        assert all(torch.equal(after[key], value) for key, value in values.items())
        attention(torch.randn(1, 3, 6)).sum().backward()


def gpt(attention):
    config = GPTConfig(vocab_size=7, block_size=5, num_layers=1, num_heads=1, embed_dim=3, dropout=0.0)
    return GPT(config, attention).double()


def batches(count):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(7, (2, 6), generator=generator) for _ in range(count)]


def loss_of(model, batch):
    return nn.functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


def train(model, steps=4):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.03)
    losses = []
    for batch in batches(steps):
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def made(name="qisa"):
    torch.manual_seed(11)
    return gpt(ATTENTION[name]())


@pytest.mark.parametrize("device", device_params())
def test_trained_folded_runs_on_every_device_and_the_other_way_round(device):
    folded = made()
    losses = train(folded)
    (batch,) = batches(1)
    expected = loss_of(folded, batch)
    there = made()
    set_execution(there, qnodes(device))
    there.load_state_dict(folded.state_dict())
    tolerance = 1e-8 if device in WORKS else 1e-4
    torch.testing.assert_close(loss_of(there, batch), expected, rtol=tolerance, atol=tolerance)

    trained = made()
    set_execution(trained, qnodes(device))
    np.testing.assert_allclose(train(trained), losses, atol=tolerance, rtol=tolerance)
    back = made()
    back.load_state_dict(trained.state_dict())
    torch.testing.assert_close(loss_of(back, batch), loss_of(trained, batch), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "name, execution",
    [
        ("qsann", qnodes("lightning.qubit", "hadamard")),
        ("qsann-multi", qnodes("lightning.qubit", "adjoint")),
        ("overlap", qnodes("lightning.qubit", "adjoint")),
    ],
)
def test_other_mechanisms_train_alike(name, execution):
    # qsann measures a single word for its queries and keys
    losses = train(made(name), steps=2)
    model = made(name)
    set_execution(model, execution)
    np.testing.assert_allclose(train(model, steps=2), losses, rtol=1e-8)
