"""Plans: what is picked, what is refused and in which words, and how many executions it will take."""

import dataclasses
import itertools

import numpy as np
import pennylane as qml
import pytest
import torch
from circuit_cases import ANSAETZE, ENCODED, QUICK, WORKS, device_params, expected_to_work, one_line, qnodes, run

from pennylane_qattn import (
    Circuit,
    CircuitFeatureMap,
    Execution,
    FunctionAnsatz,
    Noise,
    StateFeatureMap,
    build_attention,
    make_executor,
    set_execution,
)
from pennylane_qattn.devices import installed_devices
from pennylane_qattn.observables import draw_words, group_words
from pennylane_qattn.planning import METHODS, make_plan

CIRCUIT = Circuit(5, ("ZII", "XYZ", "IIY"))


def unchecked(cls, **options):
    """A description as users make it, who do not have the tests' type checks."""
    made = object.__new__(cls)
    for field in dataclasses.fields(cls):
        default = field.default_factory() if field.default is dataclasses.MISSING else field.default
        object.__setattr__(made, field.name, options.get(field.name, default))
    made.__post_init__()
    return made


def planned(execution, circuit=CIRCUIT, **options):
    return make_plan(execution, [circuit], **options)


# ---------------------------------------------------------------- which pairs work


@pytest.mark.parametrize(
    "encoding, ansatz", [*(("amplitude", name) for name in ANSAETZE), ("angle-X", "qisa"), ("angle-Y", "odd-gates")]
)
@pytest.mark.parametrize("device", device_params())
def test_pairs_that_work(device, encoding, ansatz):
    chosen, features = ENCODED[encoding]
    circuit = Circuit(features, ("Z" * chosen.num_wires(features),), chosen, ANSAETZE[ansatz])
    works = set()
    for method in METHODS:
        try:
            plan = planned(qnodes(device, method), circuit)
        except ValueError as error:
            one_line(error)
            continue
        assert (plan.executor, plan.device, plan.diff_method) == ("qnode", device, method)
        works.add(method)
    if device in WORKS:
        expected = {method for method in METHODS if expected_to_work(device, method, ansatz)}
        if (device, ansatz) == ("lightning.qubit", "odd-gates"):
            expected -= {"adjoint"}
        assert works == expected
    assert "parameter-shift" in works


def test_a_refusal_names_only_what_works():
    devices = [device for device in installed_devices() if device in QUICK]
    for device, method, ansatz in itertools.product(devices, METHODS, ("qisa", "odd-gates")):
        circuit = Circuit(5, ("ZII",), "amplitude", ANSAETZE[ansatz])
        try:
            planned(qnodes(device, method), circuit)
        except ValueError as error:
            remedy = str(error).rpartition("; use ")[2]
            named = [other for other in METHODS if other in remedy]
            assert named, error
            for other in named:
                planned(qnodes(device, other), circuit)


@pytest.mark.parametrize("name", ["PSWAP", "PhaseShift"])
@pytest.mark.parametrize("device", ["default.qubit", "lightning.qubit", "default.mixed"])
def test_gates_that_pennylane_gets_wrong_silently(name, device):
    # without a generator lightning's adjoint leaves out the gate's gradient; default.mixed detaches a phase
    def gates(weights, wires):
        qml.RY(weights[0], wires=wires[0])
        qml.RX(weights[1], wires=wires[1])
        getattr(qml, name)(weights[2], wires=wires[: getattr(qml, name).num_wires])
        qml.RX(weights[0], wires=wires[0])

    torch.manual_seed(3)
    module = CircuitFeatureMap(5, 1, 1, words=["YII", "XYI"], ansatz=FunctionAnsatz(gates, (3,))).double()
    x = torch.randn(1, 2, 5, dtype=torch.float64)
    _, _, expected = run(module, x)
    assert expected[0, 2].abs() > 0.01
    tried = 0
    for method in ("auto", "backprop", "adjoint", "parameter-shift", "hadamard"):
        try:
            set_execution(module, qnodes(device, method))
        except ValueError as error:
            assert method != "auto"
            one_line(error)
            continue
        torch.testing.assert_close(run(module, x)[2], expected, rtol=1e-9, atol=1e-9)
        tried += 1
    assert tried >= 2


# ---------------------------------------------------------------- what is picked


def test_auto_folds_where_that_is_exact_and_small():
    assert planned(Execution()).executor == "folded"
    assert planned(Execution(device="lightning.qubit")).executor == "folded"
    sampled = planned(Execution(shots=100))
    assert (sampled.executor, sampled.diff_method, sampled.input_gradient) == (
        "qnode",
        "parameter-shift",
        "polarisation",
    )
    noisy = planned(Execution(device="default.mixed", noise=Noise(depolarizing=0.1)))
    assert (noisy.executor, noisy.diff_method, noisy.input_gradient) == ("qnode", "backprop", "backprop")
    large = Circuit(16, ("Z" * 16,), "angle")
    assert planned(Execution(device="lightning.qubit"), large).diff_method == "adjoint"


@pytest.mark.parametrize(
    "device, encoding, method, by_input",
    [
        ("default.qubit", "amplitude", "backprop", "backprop"),
        ("lightning.qubit", "amplitude", "adjoint", "state"),
        ("lightning.qubit", "angle-Y", "adjoint", "adjoint"),
        ("default.mixed", "amplitude", "backprop", "backprop"),
        ("reference.qubit", "amplitude", "parameter-shift", "state"),
        ("reference.qubit", "angle-X", "parameter-shift", "parameter-shift"),
    ],
)
def test_auto_picks_the_fastest_method_of_a_device(device, encoding, method, by_input):
    chosen, features = ENCODED[encoding]
    circuit = Circuit(features, ("Z" * chosen.num_wires(features),), chosen)
    plan = planned(qnodes(device), circuit)
    assert (plan.diff_method, plan.input_gradient) == (method, by_input)
    assert "\n" not in plan.explain() and device in plan.explain() and method in plan.explain()


def test_backprop_gives_way_to_adjoint_on_many_wires():
    for wires, method in ((12, "backprop"), (13, "adjoint")):
        assert planned(qnodes(), Circuit(wires, ("Z" * wires,), "angle")).diff_method == method


def test_auto_goes_round_what_a_method_cannot_do():
    circuit = Circuit(5, ("ZII",), "amplitude", ANSAETZE["odd-gates"])
    for device in ("lightning.qubit", "default.mixed"):
        assert planned(qnodes(device), circuit).diff_method == "parameter-shift"


def test_values_alone_where_states_are_mixed_or_sampled():
    assert planned(qnodes("default.mixed", "parameter-shift")).input_gradient == "polarisation"
    assert planned(qnodes("lightning.qubit", "parameter-shift")).input_gradient == "state"
    assert planned(qnodes("lightning.qubit", "parameter-shift", shots=5)).input_gradient == "polarisation"
    assert (
        planned(qnodes("default.mixed", "parameter-shift", noise=Noise(readout=0.1))).input_gradient == "polarisation"
    )


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "options, message",
    [
        ({"executor": "foo"}, "unknown executor 'foo'; choose from auto, folded, qnode"),
        ({"diff_method": "foo"}, "unknown diff_method 'foo'; choose from auto, backprop, adjoint, parameter-shift"),
        ({"diff_method": None}, "unknown diff_method None; choose from"),
        ({"shots": 0}, "shots must be an integer of at least 1; got 0"),
        ({"shots": 1.5}, "shots must be an integer of at least 1; got 1.5"),
        ({"shots": True}, "shots must be an integer of at least 1; got True"),
        ({"shots": (3, 4)}, "shots must be an integer"),
        ({"max_executions": 0}, "max_executions must be an integer of at least 1; got 0"),
        ({"retries": -1}, "retries must be an integer of at least 0; got -1"),
        ({"seed": None}, "seed must be an integer of at least 0; got None"),
        ({"seed": -1}, "seed must be an integer of at least 0; got -1"),
        ({"noise": None}, "noise must be .*; got None"),
        ({"noise": 0.1}, "noise must be .*; got 0.1"),
        ({"device": 3}, "device must be a name; got 3"),
        ({"device_options": None}, "device_options must be .*; got None"),
        ({"device_options": {"shots": 5}}, "shots is no device_option but an option of the execution"),
        ({"gradient_options": [1]}, r"gradient_options must be .*; got \[1\]"),
    ],
)
def test_descriptions_that_are_wrong(options, message):
    with pytest.raises(ValueError, match=message) as error:
        unchecked(Execution, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"device": "foo"}, "unknown device 'foo'; installed here:"),
        ({"executor": "folded", "shots": 5}, "folding gives exact values, not shots=5; use executor qnode"),
        ({"executor": "folded", "noise": Noise(readout=0.1)}, "folding is free of noise; use executor qnode on"),
        ({"noise": Noise(readout=0.1)}, "default.qubit simulates no noise channels; use default.mixed"),
        ({"device": "lightning.qubit", "noise": Noise(depolarizing=0.1)}, "lightning.qubit simulates no noise"),
        ({"diff_method": "adjoint", "shots": 5}, "adjoint needs exact values, not shots=5; use parameter-shift"),
        ({"diff_method": "backprop", "shots": 5}, "backprop needs exact values, not shots=5; use parameter-shift"),
        ({"diff_method": "backprop", "device": "lightning.qubit"}, "lightning.qubit has no backprop; use adjoint or"),
        ({"diff_method": "adjoint", "device": "default.mixed"}, "default.mixed has no adjoint; use backprop or"),
        (
            {"diff_method": "adjoint", "device": "default.mixed", "noise": Noise(readout=0.1)},
            "adjoint needs pure states, .*; use backprop or parameter-shift",
        ),
        ({"device_options": {"wires": 2}}, "the circuit needs 3 wires; got wires=2"),
        ({"device_options": {"wires": 3}, "diff_method": "hadamard"}, "the circuit needs 4 wires; got wires=3"),
        ({"gradient_options": {"h": 1}}, "backprop takes no gradient_options; got"),
        ({"gradient_options": {"h": 1}, "diff_method": "parameter-shift"}, "no option 'h' in .*; its options: none"),
        ({"gradient_options": {"k": 1}, "diff_method": "spsa"}, "no option 'k' .*; its options: h, num_directions"),
        ({"gradient_options": {"h": 0}, "diff_method": "spsa"}, "h must be a positive number .*; got 0"),
        ({"gradient_options": {"h": "a"}, "diff_method": "finite-diff"}, "h must be a positive number .*; got 'a'"),
        ({"gradient_options": {"h": np.inf}, "diff_method": "finite-diff"}, "h must be a positive number .*; got inf"),
        ({"gradient_options": {"approx_order": 3}, "diff_method": "finite-diff"}, "gradient_options of finite-diff:"),
        ({"gradient_options": {"strategy": "up"}, "diff_method": "finite-diff"}, "gradient_options of finite-diff:"),
        ({"gradient_options": {"num_directions": 0}, "diff_method": "spsa"}, "num_directions must be at least 1"),
        ({"gradient_options": {"num_directions": True}, "diff_method": "spsa"}, "num_directions must be at least 1"),
        ({"gradient_options": {"seed": "a"}, "diff_method": "spsa"}, "seed must be a non-negative integer"),
    ],
)
def test_plans_that_are_refused_at_construction(options, message):
    with pytest.raises(ValueError, match=message) as error:
        CircuitFeatureMap(5, 1, 3, execution=Execution(**{"executor": "qnode", **options}))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name, value",
    [
        ("depolarizing", -0.1),
        ("readout", 1.5),
        ("amplitude_damping", float("nan")),
        ("readout", True),
        ("readout", "a"),
    ],
)
def test_noise_that_is_no_probability(name, value):
    with pytest.raises(ValueError, match=rf"noise.{name} is a probability in \[0, 1\]; got"):
        unchecked(Noise, **{name: value})


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"device": "default.mixed"}, "default.mixed gives none; use the folded executor"),
        ({"shots": 5}, "default.qubit gives none with shots or noise; use the folded executor"),
    ],
)
def test_states_are_refused_where_there_are_none(options, reason):
    with pytest.raises(ValueError, match=reason):
        StateFeatureMap(5, 1, execution=Execution(executor="qnode", **options))


def test_a_model_is_switched_as_a_whole_or_not_at_all():
    torch.manual_seed(0)
    attention = build_attention("overlap", 5, 1, 4, values="circuit")
    model = torch.nn.ModuleList([CircuitFeatureMap(5, 1, 3), attention])
    maps = [part for part in model.modules() if isinstance(part, CircuitFeatureMap)]
    before = [part.executor for part in maps]
    with pytest.raises(ValueError, match="overlap score reads states"):
        set_execution(model, qnodes("default.mixed"))
    assert len(maps) == 4 and [part.executor for part in maps] == before
    # and what a map remembers for later is its old execution too
    model.load_state_dict(CircuitFeatureMapWords(model))
    assert all(part.executor.plan.executor == "folded" for part in maps)


def CircuitFeatureMapWords(model):
    """The model's state with other words everywhere, so that every executor is made anew."""
    return {
        name: (value + 1) % 3 + 1 if name.endswith("word_codes") else value
        for name, value in model.state_dict().items()
    }


# ---------------------------------------------------------------- counts


@pytest.mark.parametrize(
    "ansatz, two, four", [("qisa", 9, 0), ("strongly-entangling", 9, 0), ("four-terms", 7, 3), ("odd-gates", 7, 0)]
)
@pytest.mark.parametrize("shots", [None, 10])
def test_parameter_shift_takes_2_or_4_per_gate_times_settings_plus_1(ansatz, two, four, shots):
    # four-terms: CRX, IsingXY, SingleExcitation have four; the CRot is RZ RZ RY RY RZ, then MultiRZ and RX
    words = ("ZII", "IZZ", "XYZ", "YYX", "XYZ", "IYZ")
    settings = 3 if shots else 1  # ZII, IZZ; XYZ, IYZ; YYX
    module = CircuitFeatureMap(5, 1, 1, words=words, ansatz=ANSAETZE[ansatz]).double()
    x = torch.randn(1, 2, 5, dtype=torch.float64)
    set_execution(module, qnodes("lightning.qubit", "parameter-shift", shots=shots))
    by_state = 2 * 5 * settings if shots else 1
    expected = settings * (1 + 2 * two + 4 * four) + by_state
    assert module.executor.count(2, training=True) == 2 * expected
    assert module.executor.count(2, training=False) == 2 * settings
    run(module, x)
    assert module.executor.meter.executions == 2 * expected


def counted():
    """A few cases always, all of them with the slow tests."""
    often = [
        ("lightning.qubit", None, "amplitude", "four-terms"),
        ("lightning.qubit", None, "angle-X", "qisa"),
        ("default.mixed", None, "amplitude", "qisa"),
        ("default.qubit", 3, "amplitude", "qisa"),
        ("lightning.qubit", 3, "angle-X", "qisa"),
    ]
    devices = [device for device in installed_devices() if device in QUICK]
    circuits = [("amplitude", "qisa"), ("amplitude", "four-terms"), ("angle-X", "qisa")]
    for device, shots, circuit in itertools.product(devices, (None, 3), circuits):
        case = (device, shots, *circuit)
        yield pytest.param(*case, marks=[] if case in often else pytest.mark.slow)


@pytest.mark.parametrize("cls", [CircuitFeatureMap, StateFeatureMap])
@pytest.mark.parametrize("device, shots, encoding, ansatz", [*counted()])
def test_what_is_counted_ahead_is_what_runs(device, shots, encoding, ansatz, cls):
    chosen, features = ENCODED[encoding]
    options = {"out_features": 5, "seed": 5} if cls is CircuitFeatureMap else {}
    module = cls(features, 2, ansatz=ANSAETZE[ansatz], encoding=chosen, **options).double()
    x = torch.randn(1, 2, features, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for method in METHODS:
        extra = {"gradient_options": {"num_directions": 2}} if method == "spsa" else {}
        try:
            set_execution(module, qnodes(device, method, shots=shots, **extra))
        except ValueError:
            continue
        meter = module.executor.meter
        run(module, x)
        ahead = module.executor.count(2, training=True)
        if method == "hadamard" and cls is CircuitFeatureMap:  # PennyLane leaves out what no word can see
            assert 0.5 * ahead < meter.executions <= ahead
        else:
            assert meter.executions == ahead
        before = meter.executions
        with torch.no_grad():
            module(x)
        assert meter.executions - before == module.executor.count(2, training=False)


def test_folding_counts_nothing():
    executor = make_executor([CIRCUIT])
    assert executor.count(10, training=True) == 0 and executor.meter.executions == 0


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    "words, settings",
    [
        (["ZII", "IZI", "ZZZ"], 1),
        (["XII", "ZII"], 2),
        (["XYZ", "XII", "IYI", "IIZ", "XYI"], 1),
        (["XX", "YY", "ZZ"], 3),  # they commute, but not wire by wire
        (["ZI", "ZI", "ZI"], 1),
        (["II", "XI"], 1),
        (["II"], 1),
    ],
)
def test_words_that_commute_wire_by_wire_share_a_setting(words, settings):
    groups = group_words(words)
    assert len(groups) == settings
    for basis, members in groups:
        for member in members:
            assert all(letter in ("I", read) for letter, read in zip(words[member], basis, strict=True))
    assert sorted(member for _, members in groups for member in members) == list(range(len(words)))


def test_settings_of_drawn_words():
    words = draw_words(31, 5, seed=3, identity_probability=0.5)
    groups = group_words(words)
    assert 1 < len(groups) < len(set(words))
    for basis, members in groups:
        assert set(basis) <= set("XYZ")
        for member in members:
            assert all(letter in ("I", read) for letter, read in zip(words[member], basis, strict=True))


def test_a_word_twice_is_measured_once():
    module = CircuitFeatureMap(3, 1, 1, words=["XX", "XX", "ZZ", "XX"], execution=qnodes("default.qubit", shots=11))
    before = module.executor.meter.executions
    values = module(torch.randn(1, 5, 3))[0, 0]
    assert module.executor.meter.executions - before == 5 * 2
    assert torch.equal(values[:, 0], values[:, 1]) and torch.equal(values[:, 0], values[:, 3])


def test_execution_is_a_value():
    execution = Execution(device="lightning.qubit", noise=Noise(readout=0.1))
    assert execution == dataclasses.replace(execution) != dataclasses.replace(execution, seed=1)
