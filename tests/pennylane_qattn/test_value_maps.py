"""Value maps with random, learned and mixed observables, against dense NumPy and the circuits they stand beside."""

import copy

import numpy as np
import pytest
import torch
from dense_reference import amplitude_state, qisa_unitary, word_matrix

from pennylane_qattn import (
    VALUES,
    CircuitFeatureMap,
    Execution,
    LearnedCircuitFeatureMap,
    LearnedQuadraticFeatureMap,
    MixedFeatureMap,
    QuadraticFeatureMap,
    RandomAbsorbedFeatureMap,
    RandomQuadraticFeatureMap,
    RectifiedFeatureMap,
    ReuploadedFeatureMap,
    build_attention,
    set_execution,
)
from pennylane_qattn.causality import certify
from pennylane_qattn.features import PerHeadFeatureMap, circuit_within
from pennylane_qattn.folding import Fold
from pennylane_qattn.resources import circuit_groups
from pennylane_qattn.value_maps import draw_forms, evaluate_forms

EMBED, HEADS, FEATURES, BATCH, SEQ = 15, 3, 7, 2, 5
NEW = {
    "random-quadratic": RandomQuadraticFeatureMap,
    "random-absorbed": RandomAbsorbedFeatureMap,
    "learned-quadratic": LearnedQuadraticFeatureMap,
    "rectified": RectifiedFeatureMap,
    "learned-circuit": LearnedCircuitFeatureMap,
    "reuploaded-circuit": ReuploadedFeatureMap,
    "mixed-circuit": MixedFeatureMap,
    "mixed-quadratic": MixedFeatureMap,
}
CIRCUITS = ("circuit", "learned-circuit", "mixed-circuit")


@pytest.fixture
def x(rng):
    return torch.randn(BATCH, SEQ, EMBED, dtype=torch.float64, generator=rng)


def inputs_of(x, head, split):
    """What a head reads of each token, (tokens, inputs), and how many qubits that takes."""
    width = EMBED // HEADS
    read = x.flatten(0, 1).numpy()
    read = read[:, head * width : (head + 1) * width] if split else read
    return read, int(np.ceil(np.log2(read.shape[1])))


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def check(feature_map, x, split, reference):
    """Each head's values are `reference(head, token)`, (features,)."""
    values = feature_map(x).detach().numpy()
    assert values.shape == (BATCH, HEADS, SEQ, FEATURES)
    for head in range(HEADS):
        rows, wires = inputs_of(x, head, split)
        expected = np.array([reference(head, row, wires) for row in rows]).reshape(BATCH, SEQ, FEATURES)
        np.testing.assert_allclose(values[:, head], expected, atol=1e-12)


def test_the_table_is_complete():
    assert {"linear", "circuit", "quadratic", *NEW} == set(VALUES)
    built = {name: build_attention("qisa", 8, 2, 4, values=name).value_map for name in NEW}
    assert {name: type(feature_map) for name, feature_map in built.items()} == NEW


# ---------------------------------------------------------------- random forms


@pytest.mark.parametrize("features", [1, 2, 5, 13, 16])
def test_forms_have_the_size_of_pauli_words(features):
    dim = max(2, 2 ** int(np.ceil(np.log2(features))))
    whole, cut = draw_forms(3, dim, (7, 1)), draw_forms(3, features, (7, 1))
    np.testing.assert_allclose(np.trace(whole, axis1=1, axis2=2), 0, atol=1e-12)
    np.testing.assert_allclose(
        np.linalg.norm(whole, axis=(1, 2)), np.linalg.norm(word_matrix("Z" * (dim // 2).bit_length()))
    )
    np.testing.assert_array_equal(whole, whole.transpose(0, 2, 1))
    np.testing.assert_array_equal(cut, whole[:, :features, :features])


def test_forms_vary_as_pauli_words_do():
    """On random vectors of d = 2^n entries: variance 2 ||O||^2 / (d (d + 2)), for words and random forms alike."""
    x = torch.randn(1, 4000, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    words = CircuitFeatureMap(16, 1, 1, words=("ZIII", "IXXI", "YYII")).double()
    with torch.no_grad():
        words.weights.zero_()  # no turns, so that the words are real
    forms = RandomQuadraticFeatureMap(16, 1, 3).double()
    for feature_map in (words, forms):
        variance = feature_map(x).detach()[0, 0].var(0)
        torch.testing.assert_close(variance, torch.full((3,), 2 * 16 / (16 * 18)).double(), rtol=0.08, atol=0)


@pytest.mark.parametrize("split", [False, True])
def test_random_quadratic_is_its_formula(split, x):
    feature_map = RandomQuadraticFeatureMap(EMBED, HEADS, FEATURES, split, seed=(3, 1)).double()
    assert not list(feature_map.parameters())
    forms = feature_map.forms.numpy()
    drawn = [draw_forms(FEATURES, feature_map.in_features, (3, 1, head)) for head in range(HEADS)]
    np.testing.assert_allclose(forms, drawn, atol=1e-6)  # kept in float32
    check(feature_map, x, split, lambda head, row, wires: [row @ form @ row / (row @ row) for form in forms[head]])
    torch.testing.assert_close(feature_map(3 * x), feature_map(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("split", [False, True])
def test_random_absorbed_is_its_formula(split, x):
    feature_map = RandomAbsorbedFeatureMap(EMBED, HEADS, FEATURES, split, seed=2).double()
    forms, weight = feature_map.forms.numpy(), feature_map.weight.detach().numpy()
    check(
        feature_map,
        x,
        split,
        lambda head, row, wires: [row @ weight[head].T @ f @ weight[head] @ row for f in forms[head]],
    )
    torch.testing.assert_close(feature_map(3 * x), 9 * feature_map(x), rtol=1e-12, atol=1e-12)


def test_with_a_circuits_observables_it_is_the_circuit(x):
    """The ablation replaces the forms and nothing else."""
    circuit = CircuitFeatureMap(EMBED, HEADS, FEATURES, seed=4).double()
    forms = RandomQuadraticFeatureMap(EMBED, HEADS, FEATURES).double()
    for head, words in enumerate(circuit.words):
        unitary = qisa_unitary(circuit.weights[head, 0].detach().numpy())
        for o, word in enumerate(words):
            observable = (unitary.conj().T @ word_matrix(word) @ unitary).real
            forms.forms[head, o] = torch.as_tensor(observable[:EMBED, :EMBED])
    torch.testing.assert_close(forms(x), circuit(x).detach(), rtol=1e-12, atol=1e-12)


def test_with_pauli_words_it_is_the_quadratic_map(x):
    quadratic = QuadraticFeatureMap(EMBED, HEADS, FEATURES, seed=4).double()
    forms = RandomAbsorbedFeatureMap(EMBED, HEADS, FEATURES).double()
    with torch.no_grad():
        forms.weight.copy_(quadratic.weight)
    for head, words in enumerate(quadratic.words):
        for o, word in enumerate(words):
            forms.forms[head, o] = torch.as_tensor(word_matrix(word).real[:EMBED, :EMBED])
    torch.testing.assert_close(forms(x), quadratic(x), rtol=1e-12, atol=1e-12)


def test_forms_of_seeds_layers_and_heads_differ():
    first = build_attention("qisa", 8, 2, 4, values="random-quadratic", layer=0).value_map.forms
    other = build_attention("qisa", 8, 2, 4, values="random-quadratic", layer=1).value_map.forms
    seed = build_attention("qisa", 8, 2, 4, values="random-quadratic", seed=1).value_map.forms
    for one, two in ((first, other), (first, seed), (first[0], first[1]), (first[0, 0], first[0, 1])):
        assert not torch.allclose(one, two)
    torch.manual_seed(3)  # torch's own generator has no say
    assert torch.equal(build_attention("qisa", 8, 2, 4, values="random-quadratic").value_map.forms, first)


def test_forms_by_hand():
    x = torch.tensor([[[1.0, 2.0]]])
    forms = torch.tensor([[[[1.0, 0.0], [0.0, -1.0]], [[0.0, 1.0], [1.0, 0.0]]]])
    assert evaluate_forms(x, forms).tolist() == [[[-3.0, 4.0]]]


# ---------------------------------------------------------------- learned observables


@pytest.mark.parametrize("split", [False, True])
def test_learned_quadratic_is_its_formula(split, x):
    feature_map = LearnedQuadraticFeatureMap(EMBED, HEADS, FEATURES, split).double()
    basis, values = feature_map.weight.detach().numpy(), feature_map.readout_weight.detach().numpy()
    check(feature_map, x, split, lambda head, row, wires: (basis[head] @ row) ** 2 / (row @ row) @ values[head])


@pytest.mark.parametrize("split", [False, True])
def test_rectified_is_its_formula(split, x):
    feature_map = RectifiedFeatureMap(EMBED, HEADS, FEATURES, split).double()
    basis, values = feature_map.weight.detach().numpy(), feature_map.readout_weight.detach().numpy()
    check(
        feature_map,
        x,
        split,
        lambda head, row, wires: np.maximum(basis[head] @ row, 0) / np.linalg.norm(row) @ values[head],
    )


@pytest.mark.parametrize("kind", [LearnedQuadraticFeatureMap, RectifiedFeatureMap])
def test_rank_is_the_number_of_basis_vectors(kind, x):
    torch.manual_seed(0)
    feature_map = kind(EMBED, HEADS, FEATURES, rank=4).double()
    shapes = {name: tuple(parameter.shape) for name, parameter in feature_map.named_parameters()}
    assert shapes == {"weight": (HEADS, 4, EMBED), "readout_weight": (HEADS, 4, FEATURES)}
    for basis in feature_map.weight:
        torch.testing.assert_close(basis @ basis.T, torch.eye(4).double(), rtol=1e-5, atol=1e-5)
    assert feature_map(x).shape == (BATCH, HEADS, SEQ, FEATURES)
    for rank in (0, EMBED + 1):
        with pytest.raises(ValueError, match=f"rank must lie between 1 and the 15 inputs of a head; got {rank}"):
            kind(EMBED, HEADS, FEATURES, rank=rank)
    with pytest.raises(ValueError, match="rank=3 is for values learned-quadratic and rectified; got values 'linear'"):
        build_attention("gaussian", EMBED, HEADS, 7, rank=3)


def test_learned_quadratic_can_be_any_form(x):
    form = draw_forms(1, EMBED, 8)[0]
    eigenvalues, basis = np.linalg.eigh(form)
    feature_map = LearnedQuadraticFeatureMap(EMBED, 1, 1).double()
    with torch.no_grad():
        feature_map.weight[0], feature_map.readout_weight[0, :, 0] = torch.tensor(basis.T), torch.tensor(eigenvalues)
    rows = unit(x.flatten(0, 1).numpy())
    expected = np.einsum("ti,ij,tj->t", rows, form, rows)
    np.testing.assert_allclose(feature_map(x).detach().numpy().ravel(), expected, atol=1e-12)


def test_learned_observables_start_at_the_size_of_pauli_words():
    torch.manual_seed(3)
    quadratic = LearnedQuadraticFeatureMap(64, 2, 50)
    for basis in quadratic.weight:
        torch.testing.assert_close(basis @ basis.T, torch.eye(64), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(*quadratic.weight)
    assert quadratic.readout_weight.square().mean().item() == pytest.approx(1, abs=0.05)
    circuit = LearnedCircuitFeatureMap(64, 2, 50)
    assert circuit.readout_weight.square().sum(1).mean().item() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("split", [False, True])
def test_learned_circuit_reads_the_probabilities(split, x):
    """v = S^T p, the columns of S being the learned combinations of words, whose eigenvalues sum to zero."""
    feature_map = LearnedCircuitFeatureMap(EMBED, HEADS, FEATURES, split=split).double()
    words_map, readout = feature_map.words_map, feature_map.readout_weight.detach().numpy()
    for words in words_map.words:
        assert len(set(words)) == len(words) == 2**words_map.num_wires - 1 and set("".join(words)) == set("IZ")

    def reference(head, row, wires):
        angles = words_map.weights[head, 0].detach().numpy()
        probabilities = np.abs(qisa_unitary(angles) @ amplitude_state(row, wires)) ** 2
        diagonals = np.array([np.diag(word_matrix(word)) for word in words_map.words[head]])
        values = diagonals.T @ readout[head]
        np.testing.assert_allclose(values.sum(0), 0, atol=1e-12)
        return values.T @ probabilities

    check(feature_map, x, split, reference)


def test_all_diagonal_words_are_one_setting():
    (group,) = circuit_groups([build_attention("qisa", 16, 2, 4, values="learned-circuit")])
    assert group.count == 2 and len(group.circuits[0].words) == 15
    assert [each.settings for each in group.each] == [1, 1]


# ---------------------------------------------------------------- mixtures


@pytest.mark.parametrize("kind", [CircuitFeatureMap, QuadraticFeatureMap, RandomQuadraticFeatureMap])
def test_mixtures_are_the_weighted_sum(kind, x):
    """Any other map may be mixed in."""
    other = kind(EMBED, HEADS, FEATURES)
    feature_map = MixedFeatureMap(other, bias=True).double()
    assert torch.equal(feature_map.mixture.detach(), torch.ones(HEADS, 2).double())
    linear = feature_map.linear_map.linear
    lines = (x @ linear.weight.T + linear.bias).unflatten(-1, (HEADS, FEATURES)).transpose(1, 2)
    torch.testing.assert_close(feature_map(x), lines + other(x), rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        feature_map.mixture.copy_(torch.arange(6.0).view(3, 2) - 2)
    first, second = (torch.tensor(w)[:, None, None] for w in ([-2.0, 0.0, 2.0], [-1.0, 1.0, 3.0]))
    torch.testing.assert_close(feature_map(x), first * lines + second * other(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("values", ["mixed-circuit", "mixed-quadratic"])
def test_a_mixtures_parts_are_the_mechanisms_own(values):
    """Words, split and bias of the part are what the mechanism would have alone."""
    options = {"split": True, "bias": True, "seed": 3, "layer": 2}
    mixed = build_attention("qisa", EMBED, HEADS, 7, values=values, **options).value_map
    alone = build_attention("qisa", EMBED, HEADS, 7, values=values.removeprefix("mixed-"), **options).value_map
    assert type(mixed.other_map) is type(alone) and mixed.other_map.words == alone.words
    assert mixed.other_map.in_features == alone.in_features == 5
    assert mixed.linear_map.linear.bias is not None


def test_linear_parts_have_the_precision_of_the_model(x):
    for values in ("mixed-circuit", "learned-circuit"):
        module = build_attention("gaussian", EMBED, HEADS, 7, values=values).bfloat16()
        for _ in range(2):
            for name, parameter in module.named_parameters():
                wanted = torch.float32 if name.endswith(".weights") else torch.bfloat16
                assert parameter.dtype == wanted, name
            assert module(x.bfloat16()).dtype == torch.bfloat16
            module.load_state_dict(module.state_dict())


@pytest.mark.parametrize("values", CIRCUITS)
def test_tools_find_the_circuit_within(values):
    module = build_attention("qisa", 16, 2, 4, values=values)
    (group,) = circuit_groups([module])
    assert group.count == 2 and group.maps == ("value",)
    assert repr(module) == "QISA(embed=16, heads=2, head_dim=8, qubits=4)"
    within = circuit_within(module.value_map)
    assert isinstance(within, CircuitFeatureMap) and list(group.circuits) == within.circuits
    assert circuit_within(module.query_map) is None


# ---------------------------------------------------------------- all of them


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("values", VALUES)
def test_gradients(values, split, rng):
    """Of the inputs and of all parameters, in float64."""
    module = build_attention("qisa", 6, 2, 4, values=values, split=split, head_dim=3, bias=False).double()
    feature_map = module.value_map
    x = torch.randn(1, 2, 6, dtype=torch.float64, generator=rng, requires_grad=True)
    parameters = dict(feature_map.named_parameters())

    def run(x, *tensors):
        return torch.func.functional_call(feature_map, dict(zip(parameters, tensors, strict=True)), x)

    tensors = [p.detach().clone().requires_grad_() for p in parameters.values()]
    assert torch.autograd.gradcheck(run, (x, *tensors))
    assert torch.autograd.gradgradcheck(run, (x, *tensors))


@pytest.mark.parametrize("values", VALUES)
def test_all_are_causal(values):
    certificate = certify(build_attention("gaussian", 6, 2, 5, values=values))
    assert certificate.passes, certificate


@pytest.mark.parametrize("values", [*CIRCUITS, "random-quadratic", "learned-quadratic", "rectified"])
def test_the_zero_vector(values, x):
    """Read as the first basis vector, with gradient 0."""
    feature_map = build_attention("qsann", EMBED, HEADS, 7, values=values).value_map.double()
    zero = torch.zeros(1, 1, EMBED, dtype=torch.float64, requires_grad=True)
    values_there = feature_map(zero)
    first = torch.zeros(1, 1, EMBED).double()
    first[..., 0] = 1
    expected = feature_map(first)
    if values == "mixed-circuit":
        expected = expected - feature_map.linear_map(first)
    torch.testing.assert_close(values_there, expected, rtol=1e-12, atol=1e-12)
    (gradient,) = torch.autograd.grad(values_there.sum(), zero)
    if values == "mixed-circuit":
        gradient = gradient - feature_map.linear_map.linear.weight.sum(0)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-14)


@pytest.mark.parametrize("values", NEW)
def test_tiny_and_huge_vectors_are_finite(values):
    feature_map = build_attention("qisa", EMBED, HEADS, 7, values=values).value_map
    normalised = values in ("random-quadratic", "learned-quadratic", "rectified", "learned-circuit")
    for scale in (1e-30, 1e-3, 1e30) if normalised else (1e-30, 1e-3):
        x = torch.full((1, 1, EMBED), scale, requires_grad=True)
        out = feature_map(x)
        out.sum().backward()
        assert out.isfinite().all() and x.grad.isfinite().all()


@pytest.mark.parametrize("values", NEW)
def test_state_of_half_precision_is_widened(values, x):
    """`assign=True` puts the tensors of a checkpoint in place of the module's own."""
    feature_map = build_attention("qisa", EMBED, HEADS, 7, values=values).value_map
    expected = copy.deepcopy(feature_map)(x.float())
    half = {name: t.bfloat16() if t.is_floating_point() else t for name, t in feature_map.state_dict().items()}
    feature_map.load_state_dict(half, assign=True)
    for part in feature_map.modules():
        if isinstance(part, PerHeadFeatureMap):
            own = [*part.parameters(), *part.buffers()]
            assert all(tensor.dtype == torch.float32 for tensor in own if tensor.is_floating_point())
    feature_map.float()
    torch.testing.assert_close(feature_map(x.float()), expected, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("values", CIRCUITS)
@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("method", ["adjoint", "parameter-shift"])
def test_devices_give_the_same(values, trainable, method, x):
    module = build_attention("qisa", EMBED, HEADS, 7, values=values, trainable=trainable).double()
    x = x[:1, :3].requires_grad_()
    wanted = [x, *(p for p in module.parameters() if p.requires_grad)]
    assert len(wanted) == 1 + len(list(module.parameters())) - (not trainable)
    folded = module(x)
    expected = torch.autograd.grad(folded.square().sum(), wanted)
    set_execution(module, Execution(executor="qnode", device="default.qubit", diff_method=method))
    out = module(x)
    torch.testing.assert_close(out, folded, rtol=1e-9, atol=1e-9)
    found = torch.autograd.grad(out.square().sum(), wanted)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)


# ---------------------------------------------------------------- frozen angles


@pytest.mark.parametrize(
    ("name", "values", "frozen"),
    [
        ("qisa", "circuit", ["value_map.weights"]),
        ("qsann", "circuit", ["query_map.weights", "key_map.weights", "value_map.weights"]),
        ("qsann-multi", "linear", ["query_map.weights", "key_map.weights"]),
        ("overlap", "mixed-circuit", ["query_map.weights", "key_map.weights", "value_map.other_map.weights"]),
        ("scaled-dot", "learned-circuit", ["value_map.words_map.weights"]),
    ],
)
def test_frozen_angles_stay_where_they_were_drawn(name, values, frozen, x):
    made = []
    for trainable in (True, False):
        torch.manual_seed(5)
        made.append(build_attention(name, EMBED, HEADS, 7, values=values, trainable=trainable).double())
    free, module = made
    assert list(free.state_dict()) == list(module.state_dict())
    assert torch.equal(free(x), module(x))
    assert [n for n, p in module.named_parameters() if not p.requires_grad] == frozen
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    module = copy.deepcopy(module).float().double()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, weight_decay=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        module(x).square().sum().backward()
        optimizer.step()
    for n, parameter in module.named_parameters():
        assert torch.allclose(parameter, before[n], rtol=1e-6) == (n in frozen), n


def test_the_fold_of_frozen_angles_is_kept_in_training(x, monkeypatch):
    module = build_attention("qisa", EMBED, HEADS, 7, trainable=False).double()
    calls = []
    evolve = Fold.evolve
    monkeypatch.setattr(Fold, "evolve", lambda self, *args: calls.append(1) or evolve(self, *args))
    x.requires_grad_()
    for _ in range(3):
        module(x).sum().backward()
    assert len(calls) == 1
    before = module(x).detach()
    module.load_state_dict({**module.state_dict(), "value_map.weights": module.value_map.weights + 1})
    assert not torch.allclose(module(x), before) and len(calls) == 2


def test_a_fold_from_inference_mode_serves_no_training(x):
    """As Lightning does: validation in inference mode, then training goes on."""
    module = build_attention("qisa", EMBED, HEADS, 7, trainable=False).double()
    with torch.inference_mode():
        expected = module(x).clone()
    x.requires_grad_()
    out = module(x)
    out.sum().backward()
    torch.testing.assert_close(out.detach(), expected, rtol=1e-12, atol=1e-12)
    with torch.inference_mode():
        torch.testing.assert_close(module(x), expected, rtol=1e-12, atol=1e-12)


def test_frozen_and_free_angles_differentiate_the_inputs_alike(x):
    x.requires_grad_()
    gradients = []
    for trainable in (True, False):
        torch.manual_seed(5)
        module = build_attention("qisa", EMBED, HEADS, 7, trainable=trainable).double()
        gradients.append(torch.autograd.grad(module(x).square().sum(), x)[0])
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)
