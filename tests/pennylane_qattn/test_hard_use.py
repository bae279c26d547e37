"""What people do to a module that nobody planned for: hostile data, odd modes, odd precisions, odd functions."""

import functools
import math

import numpy as np
import pennylane as qml
import pytest
import torch

from pennylane_qattn import (
    CircuitFeatureMap,
    FunctionAnsatz,
    GaussianScore,
    OverlapScore,
    PublishedGaussianScore,
    QISAAnsatz,
    build_attention,
)
from pennylane_qattn.circuit import Circuit
from pennylane_qattn.execution import FoldedExecutor
from pennylane_qattn.program import Program
from pennylane_qattn.registry import from_plain


def stored(**changes):
    program = FunctionAnsatz(computed, ("wires",)).program(2).to_plain()
    for key, value in changes.items():
        section = program["angles"] if key in ("nodes", "outputs", "inputs") else program
        section[key] = value
    return program


def computed(weights, wires):
    for wire, angle in zip(wires, weights, strict=True):
        qml.RX(2 * angle, wires=wire)


GATE = {"gate": "RX", "wires": [0], "angle": 0, "word": None, "matrix": None}
EVAL = [["_operator.getitem", [{"x": "__builtins__"}, "eval"], {}], ["add.__call__", ["1/0"], {}]]


@pytest.mark.parametrize(
    "changes",
    [
        {"nodes": EVAL},
        {"nodes": [["add.__getattribute__", ["_op"], {}]]},
        {"nodes": [["add_.Tensor", [{"ref": 0}, {"ref": 0}], {}]]},
        {"nodes": [["add.out", [{"ref": 0}, {"ref": 0}], {"out": {"ref": 0}}]]},
        {"nodes": [["add.Foo", [], {}]]},
        {"nodes": [["mul.Tensor", [{"ref": 9}, 2], {}]]},
        {"nodes": [["mul.Tensor", [{"ref": -1}, 2], {}]]},
        {"nodes": [["constant", [{"dtype": "load"}], {}]]},
        {"nodes": [[3, [], {}]]},
        {"nodes": [3]},
        {"outputs": [99]},
        {"inputs": 2},
        {"num_wires": 0},
        {"num_wires": "2"},
        {"shape": [-1]},
        {"shape": [10**15]},
        {"shape": ["a"]},
        {"gates": [{**GATE, "wires": [5]}]},
        {"gates": [{**GATE, "wires": [0, 1]}]},
        {"gates": [{**GATE, "wires": [0.0]}]},
        {"gates": [{**GATE, "angle": 0.5}]},
        {"gates": [{**GATE, "angle": 7}]},
        {"gates": [{**GATE, "word": "X"}]},
        {"gates": [{**GATE, "gate": "PauliRot"}]},
        {"gates": [{**GATE, "gate": "eval"}]},
        {"gates": [{**GATE, "angle": None}]},
        {"gates": [{**GATE, "gate": "QubitUnitary", "angle": None, "matrix": [[[2, 0], [0, 0]], [[0, 0], [2, 0]]]}]},
        {"entries": [-1, 0], "angles": None},
        {"entries": ["a", 0], "angles": None},
        {"entries": [7, 0], "angles": None},
    ],
)
def test_hostile_programs_are_refused(changes):
    Program.from_plain(stored())
    with pytest.raises(ValueError, match="traced"):
        Program.from_plain(stored(**changes))


@pytest.mark.parametrize(
    "data", [{"kind": [], "name": "qisa"}, {"kind": "ansatz", "name": []}, {"kind": "ansatz", "name": "qisa", 3: 1}]
)
def test_hostile_descriptions_are_refused(data):
    with pytest.raises(ValueError, match="description|unknown"):
        from_plain(data)


@pytest.mark.parametrize("option", ["what", "self", "cls"])
def test_option_names_that_python_uses(option):
    with pytest.raises(ValueError, match=f"has no option '{option}'"):
        from_plain({"kind": "ansatz", "name": "qisa", option: 1})


# ---------------------------------------------------------------- functions of one's own


def clamped(weights, wires):
    for wire, angle in zip(wires, torch.clamp(weights, -math.pi, math.pi), strict=True):
        qml.RX(angle, wires=wire)
        qml.RY(0.3, wires=wire)


def hidden_branch(weights, wires):
    qml.RX(weights[0], wires=wires[0])
    if np.any(weights.detach().numpy() > 3.2):
        qml.CNOT(wires[:2])


def constant_matrix(weights, wires):
    for wire, angle in zip(wires, (torch.eye(3, dtype=weights.dtype) * 0.37) @ weights, strict=True):
        qml.RX(angle, wires=wire)


def scalar_weight(weights, wires):
    for wire in wires:
        qml.RX(weights, wires=wire)


def numpy_wires(weights, wires):
    qml.RX(weights[0], wires=np.int64(wires[0]))


@pytest.mark.parametrize(
    ("function", "shape"),
    [(clamped, ("wires",)), (constant_matrix, (3,)), (scalar_weight, ()), (numpy_wires, (1,))],
)
def test_odd_functions_fold_and_are_stored(function, shape, dtype, close):
    circuit = Circuit(5, ("XYZ", "ZIX"), ansatz=FunctionAnsatz(function, shape))
    weights = torch.linspace(4, 6, math.prod(circuit.weight_shape), dtype=dtype).reshape(1, *circuit.weight_shape)
    x = torch.arange(1.0, 6.0, dtype=dtype)[None]
    values = FoldedExecutor([circuit]).expectations(x[None], weights)[0, 0]
    close(values, torch.stack(circuit.qnode()(x[0].double(), weights[0].double())))
    again = Circuit(5, ("XYZ", "ZIX"), ansatz=from_plain(circuit.ansatz.to_plain()))
    assert torch.equal(FoldedExecutor([again]).expectations(x[None], weights)[0, 0], values)


def test_a_branch_beyond_a_turn_is_found():
    with pytest.raises(ValueError, match="hidden_branch.* does not see"):
        FunctionAnsatz(hidden_branch, (2,)).program(2)


def test_a_partial_function_is_stored():
    ansatz = FunctionAnsatz(functools.partial(computed), ("wires",))
    ansatz.program(2)
    assert from_plain(ansatz.to_plain()).shape(2) == (2,)


def test_a_function_that_fails_is_named():
    with pytest.raises(ValueError, match="scalar_weight: RX takes one angle; got 4"):
        FunctionAnsatz(scalar_weight, (2, 2)).program(2)


def test_a_matrix_that_is_not_unitary_is_refused():
    def stretched(weights, wires):
        qml.QubitUnitary(2 * np.eye(2), wires=wires[0], unitary_check=False)

    with pytest.raises(ValueError, match="not unitary"):
        FunctionAnsatz(stretched, (1,)).program(2)


# ---------------------------------------------------------------- modes and precisions


def test_made_in_inference_mode_trained_outside():
    with torch.inference_mode():
        state = CircuitFeatureMap(5, 1, 3, ansatz="basic-entangler", seed=4).state_dict()
    feature_map = CircuitFeatureMap(5, 1, 3, ansatz="basic-entangler", seed=5)
    with torch.inference_mode():
        feature_map.load_state_dict({name: tensor.clone() for name, tensor in state.items()})
        feature_map(torch.ones(1, 1, 5).double())
    for dtype in (torch.float32, torch.float64):
        feature_map(torch.ones(1, 2, 5, dtype=dtype)).sum().backward()


@pytest.mark.parametrize("name", ["qisa", "qisa-absorbed"])
def test_angles_stay_in_float32_whatever_the_default(name):
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        module = build_attention(name, 4, 1, 4)
    finally:
        torch.set_default_dtype(before)
    assert next(module.value_map.parameters()).dtype == torch.float32
    assert module.query_map.linear.weight.dtype == torch.bfloat16
    half = {key: t.bfloat16() if t.is_floating_point() else t for key, t in module.state_dict().items()}
    module.load_state_dict(half, assign=True)
    assert next(module.value_map.parameters()).dtype == torch.float32


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("size", [1.0, 10.0, 100.0])
def test_the_published_score_of_equals_is_one(half, size, rng):
    q = (torch.randn(1, 1, 7, 16, generator=rng) * size).to(half)
    score = PublishedGaussianScore(1, 16)
    with torch.autocast("cpu", torch.bfloat16):
        values = score(score.queries(q), score.keys(q))
    assert values.dtype == torch.float32 and (values <= 1).all()
    rounding = 4 * torch.finfo(torch.float32).eps * float(q.float().square().sum(-1).max())
    assert (values[0, 0].diagonal() >= 1 - rounding).all()


@pytest.mark.parametrize("beta", [1e-3, 1.0, 30.0, 300.0])
def test_any_sharpness(beta):
    torch.testing.assert_close(GaussianScore(2, 4, beta=beta).beta, torch.full((2,), beta))


def test_overlap_of_a_zero_vector_in_half_precision():
    score = OverlapScore(1, 4)
    q = torch.zeros(1, 1, 2, 4, dtype=torch.float16)
    assert torch.isfinite(score(score.queries(q), score.keys(q))).all()


def test_subnormal_vectors():
    values = CircuitFeatureMap(4, 1, 2)(torch.tensor([[[1e-40, 0, 0, 0], [1.0, 0, 0, 0]]]))[0, 0]
    torch.testing.assert_close(values[0], values[1])


# ---------------------------------------------------------------- attention


@pytest.mark.parametrize("name", ["classical", "qisa", "gaussian", "overlap"])
@pytest.mark.parametrize("cached", [False, True])
def test_padding_may_hold_anything(name, cached, rng):
    module = build_attention(name, 6, 2, 5).double()
    x = torch.randn(2, 5, 6, dtype=torch.float64, generator=rng)
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[0, 1] = True
    expected = module(x, key_padding_mask=padding)
    x[0, 1] = float("nan")
    cache = module.new_cache(2) if cached else None
    out = module(x, key_padding_mask=padding, cache=cache)
    torch.testing.assert_close(out[~padding], expected[~padding], rtol=1e-12, atol=1e-12)


def test_a_cache_of_frozen_keys_has_gradients(rng):
    module = build_attention("classical", 6, 2, 5)
    module.key_map.requires_grad_(False)
    cache = module.new_cache(1)
    x = torch.randn(1, 5, 6, generator=rng)
    torch.cat([module(x[:, i : i + 1], cache=cache) for i in range(5)], dim=1).sum().backward()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"key_padding_mask": torch.zeros(2, 3, dtype=torch.long)}, "must be boolean"),
        ({"key_padding_mask": torch.zeros(2, 4, dtype=torch.bool)}, r"shape \(batch, seq\) \(2, 3\); got \(2, 4\)"),
        ({"position_ids": torch.arange(3)[None]}, r"position_ids must have the shape .*; got \(1, 3\)"),
    ],
)
def test_odd_masks(options, message, monkeypatch):
    module = build_attention("classical", 6, 2, 5)
    check = type(module)._check
    with pytest.raises(ValueError, match=message):
        check(module, torch.zeros(2, 3, 6), options.get("key_padding_mask"), options.get("position_ids"), None)


@pytest.mark.parametrize("codes", [torch.full((1, 2, 2), -1), torch.full((1, 2, 2), 4), torch.zeros(1, 2, 2)])
def test_corrupt_words(codes):
    feature_map = CircuitFeatureMap(4, 1, 2, ansatz=QISAAnsatz())
    words = feature_map.words
    with pytest.raises(ValueError, match="must hold 0 to 3"):
        feature_map.load_state_dict({**feature_map.state_dict(), "word_codes": codes})
    assert feature_map.words == words
