"""Devices: what is opened, counted, tried again and asked; a device that is not on this machine above all."""

import copy
import pickle
import sys

import pennylane as qml
import pytest
import torch
from circuit_cases import one_line, qnodes, run

from pennylane_qattn import CircuitFeatureMap, set_execution
from pennylane_qattn import devices as devices_module
from pennylane_qattn.devices import ExecutionBudgetError, Meter, Runner, installed_devices, open_device
from pennylane_qattn.execution import executors

FAR_DEVICE = '''
import pennylane as qml

class FarDevice(qml.devices.Device):
    """Counts and fails as it is told; inside is a simulator."""

    name = "far.qubit"
    received, failures, opened = [], [], 0

    def __init__(self, wires=None, shots=None, secret=None):
        super().__init__(wires=wires)
        self.inside = qml.device("default.qubit", wires=wires, seed=5)
        FarDevice.opened += 1

    def setup_execution_config(self, config=None, circuit=None):
        return self.inside.setup_execution_config(config, circuit)

    def preprocess_transforms(self, execution_config=None):
        return self.inside.preprocess_transforms(execution_config)

    def supports_derivatives(self, execution_config=None, circuit=None):
        return execution_config is not None and execution_config.gradient_method == "adjoint"

    def execute(self, circuits, execution_config=None):
        FarDevice.received.append(len(circuits))
        if FarDevice.failures and FarDevice.failures.pop(0):
            raise ConnectionError("the queue is closed")
        return self.inside.execute(circuits, execution_config)
'''


@pytest.fixture
def far(tmp_path, monkeypatch):
    """A device of a package that is installed, as far as Python can tell; and what it received."""
    (tmp_path / "far_away.py").write_text(FAR_DEVICE)
    information = tmp_path / "far_away-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: far-away\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text("[pennylane.plugins]\nfar.qubit = far_away:FarDevice\n")
    monkeypatch.syspath_prepend(tmp_path)
    waits = []
    monkeypatch.setattr(devices_module.time, "sleep", waits.append)
    qml.refresh_devices()
    import far_away

    far_away.FarDevice.waits = waits
    yield far_away.FarDevice
    monkeypatch.undo()
    sys.modules.pop("far_away", None)
    qml.refresh_devices()


def feature_map(**options):
    torch.manual_seed(1)
    return CircuitFeatureMap(3, 2, 1, words=["ZI", "XY", "IZ"], **options).double()


def tokens(count=3):
    return torch.randn(1, count, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


# ---------------------------------------------------------------- a device that is not here


def test_a_far_device_is_asked_nothing_and_planned_for(far):
    assert "far.qubit" in installed_devices()
    module = feature_map()
    (plan,) = set_execution(module, qnodes("far.qubit"))
    assert (plan.diff_method, plan.input_gradient) == ("parameter-shift", "polarisation")
    assert not plan.is_local_and_exact and far.received == []
    assert module.executor.meter.limit == 10_000


def test_a_far_device_gives_what_folding_gives(far):
    module = feature_map()
    expected = run(module, tokens())
    set_execution(module, qnodes("far.qubit"))
    module.executor.count(3, training=True)
    assert far.received == []
    for ours, theirs in zip(run(module, tokens()), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    # forward, shifts, polarisation: each goes out whole
    assert len(far.received) == 3 and sum(far.received) == module.executor.meter.executions
    assert module.executor.meter.executions == module.executor.count(3, training=True) == 3 * 2 * (1 + 2 * 6 + 2 * 3)


def test_a_far_device_samples(far):
    module = feature_map(execution=qnodes("far.qubit", shots=13))
    x = tokens(1).expand(1, 5, 3)
    assert len(set(module(x)[0, 0, :, 1].tolist())) > 1
    assert sum(far.received) == 5 * 2 * 2  # ZI and IZ share a setting


def test_every_kind_of_circuit_is_translated_for_the_device(far, monkeypatch):
    # the settings differ in their last gates: the first may need no translation when others do
    def translated(device, execution_config=None):
        program = qml.CompilePipeline()
        program.add_transform(qml.transforms.decompose, gate_set={"StatePrep", "RX", "RY", "RZ", "CNOT", "GlobalPhase"})
        return program

    inside = far.execute

    def execute(device, circuits, execution_config=None):
        names = {operation.name for circuit in circuits for operation in circuit.operations}
        assert "Hadamard" not in names
        return inside(device, circuits, execution_config)

    monkeypatch.setattr(far, "preprocess_transforms", translated)
    monkeypatch.setattr(far, "execute", execute)
    module = feature_map(execution=qnodes("far.qubit", shots=2000))
    exact = feature_map()(tokens())
    torch.testing.assert_close(module(tokens()), exact, rtol=0, atol=5 / 2000**0.5)


def test_failed_calls_are_tried_again(far):
    module = feature_map(execution=qnodes("far.qubit", retries=2))
    expected = module(tokens())
    far.failures[:] = [True, True, False]
    before = module.executor.meter.executions
    torch.testing.assert_close(module(tokens()), expected)
    assert far.waits == [1, 2]
    assert module.executor.meter.executions == 4 * before  # the device charges for what failed, too


def test_no_try_goes_beyond_the_limit(far):
    module = feature_map(execution=qnodes("far.qubit", max_executions=11))
    far.failures[:] = [True]
    with pytest.raises(ExecutionBudgetError):
        module(tokens())
    assert far.received == [6]


def test_a_device_that_always_fails_says_so(far):
    module = feature_map(execution=qnodes("far.qubit", retries=1))
    far.failures[:] = [True] * 9
    with pytest.raises(ConnectionError, match="the queue is closed"):
        module(tokens())
    assert far.received == [6, 6] and far.waits == [1]


def test_without_retries_nothing_is_tried_again(far):
    module = feature_map(execution=qnodes("far.qubit", retries=0))
    far.failures[:] = [True]
    with pytest.raises(ConnectionError):
        module(tokens())
    assert far.received == [6] and far.waits == []


def test_a_simulator_here_is_not_tried_again(monkeypatch):
    module = feature_map(execution=qnodes("lightning.qubit", "adjoint"))
    module(tokens())
    calls = []

    def fail(*_):
        calls.append(1)
        raise RuntimeError("broken")

    monkeypatch.setattr(module.executor.runner, "_execute", fail)
    with pytest.raises(RuntimeError, match="broken"):
        module(tokens())
    assert len(calls) == 1


def test_the_limit_stops_before_anything_runs(far):
    module = feature_map(execution=qnodes("far.qubit", max_executions=11))
    module(tokens())
    with pytest.raises(
        ExecutionBudgetError, match="max_executions is 11 and 6 are done; .* far.qubit needs 6 more"
    ) as e:
        module(tokens())
    assert "\n" not in str(e.value)
    assert far.received == [6] and module.executor.meter.executions == 6
    module(tokens(2))  # what still fits may run
    assert far.received == [6, 4]


def test_the_default_limit_holds_on_far_devices_alone(far):
    module = feature_map(execution=qnodes("far.qubit"))
    with pytest.raises(ExecutionBudgetError, match="10,000"):
        module(torch.randn(1, 5001, 3, dtype=torch.float64))
    assert far.received == []
    assert feature_map(execution=qnodes("far.qubit", max_executions=20_000)).executor.meter.limit == 20_000
    for device in ("default.qubit", "lightning.qubit", "default.mixed"):
        assert feature_map(execution=qnodes(device)).executor.meter.limit is None


def test_adjoint_is_no_method_of_a_far_device(far):
    with pytest.raises(ValueError, match="adjoint needs a simulator on this machine") as error:
        feature_map(execution=qnodes("far.qubit", "adjoint"))
    one_line(error.value)


def test_a_far_device_takes_its_options_and_no_seed(far):
    assert open_device("far.qubit", 2, {"secret": "s"}, seed=3).inside
    with pytest.raises(ValueError, match="'far.qubit' cannot be made with .*colour") as error:
        open_device("far.qubit", 2, {"colour": "red"})
    assert "\n" not in str(error.value)


def test_copies_open_a_far_device_anew(far):
    module = feature_map(execution=qnodes("far.qubit"))
    module(tokens())
    opened = far.opened
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        torch.testing.assert_close(other(tokens()), module(tokens()))
    assert far.opened > opened


# ---------------------------------------------------------------- counting


def tracked(module, function):
    with qml.Tracker(module.executor.runner.device) as tracker:
        result = function()
    return result, tracker.totals


@pytest.mark.parametrize("distinct", [5, 11])
def test_lightning_runs_once_per_distinct_input_forward_and_backward(distinct):
    module = feature_map(execution=qnodes("lightning.qubit", "adjoint"))
    module(tokens(1))  # the device has been asked what it can do
    x = tokens(distinct).requires_grad_()
    before = module.executor.meter.executions
    values, totals = tracked(module, lambda: module(x))
    assert totals["simulations"] == 2 * distinct
    _, totals = tracked(module, lambda: values.sum().backward())
    assert totals["simulations"] == 2 * distinct  # U backwards on H psi, for the inputs
    assert totals["derivatives"] in (2 * distinct, 4 * distinct)  # the angles; lightning counts them twice
    assert module.executor.meter.executions - before == 3 * 2 * distinct


def test_equal_inputs_run_once():
    module = feature_map(execution=qnodes("lightning.qubit", "adjoint"))
    module(tokens(1))
    x = tokens(3)[:, [0, 1, 0, 2, 1, 0, 0]]
    scaled = x * torch.linspace(1, 2, 7)[None, :, None].double() * 0 + x
    _, totals = tracked(module, lambda: module(scaled))
    assert totals["simulations"] == 2 * 3
    module.weights.grad = None
    values = module(x)
    _, totals = tracked(module, lambda: values.sum().backward())
    assert "simulations" not in totals and totals["derivatives"] in (6, 12)


def test_equal_inputs_are_never_merged_when_sampling():
    for device in ("lightning.qubit", "default.qubit", "default.mixed"):
        module = feature_map(execution=qnodes(device, shots=7))
        before = module.executor.meter.executions
        values = module(tokens(1).expand(1, 19, 3))
        assert module.executor.meter.executions - before == 19 * 2 * 2
        assert len(set(map(tuple, values[0, 0].tolist()))) > 3


def test_heads_that_read_their_own_slice_run_their_own_inputs():
    torch.manual_seed(0)
    module = CircuitFeatureMap(6, 2, 3, split=True, execution=qnodes("lightning.qubit")).double()
    x = torch.randn(1, 5, 6, dtype=torch.float64)
    x[0, :, :3] = x[0, 0, :3]  # the first head sees one input only
    before = module.executor.meter.executions
    module(x)
    assert module.executor.meter.executions - before == 1 + 5


def test_one_meter_for_a_model():
    model = torch.nn.ModuleList([feature_map(), feature_map()])
    set_execution(model, qnodes("lightning.qubit", max_executions=13))
    first, second = executors(model)
    assert first.meter is second.meter
    model[0](tokens())
    model[1](tokens())
    assert first.meter.executions == 12
    with pytest.raises(ExecutionBudgetError):
        model[0](tokens())


def test_copies_of_a_model_share_a_meter_of_their_own():
    model = torch.nn.ModuleList([feature_map(), feature_map()])
    set_execution(model, qnodes("lightning.qubit"))
    model[0](tokens())
    other = copy.deepcopy(model)
    first, second = executors(other)
    assert first.meter is second.meter and first.meter is not model[0].executor.meter
    other[1](tokens())
    assert first.meter.executions == 12 and model[0].executor.meter.executions == 6


def test_a_meter_without_limit_counts():
    meter = Meter()
    meter.charge(10**9, "any")
    assert meter.executions == 10**9


# ---------------------------------------------------------------- opening, asking


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("foo.bar", {}, "unknown device 'foo.bar'; installed here: .*default.qubit"),
        ("lightning.qubit", {"wires": 2}, "the circuit needs 3 wires; got wires=2"),
        ("lightning.qubit", {"wires": None}, "the circuit needs 3 wires; got wires=None"),
        ("default.mixed", {"wires": ["a", "b", "c"]}, "the circuit needs 3 wires"),
        ("lightning.qubit", {"c_dtype": "float"}, "c_dtype is complex64 or complex128; got 'float'"),
        ("lightning.qubit", {"c_dtype": "nothing"}, "c_dtype is complex64 or complex128; got 'nothing'"),
        ("lightning.qubit", {"colour": "red"}, "cannot be made with .*colour"),
    ],
)
def test_what_cannot_be_opened(name, options, message):
    with pytest.raises(ValueError, match=message) as error:
        open_device(name, 3, options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", sorted(devices_module.PACKAGES))
def test_a_plugin_that_is_not_installed_names_its_package(name, monkeypatch):
    monkeypatch.setattr(devices_module, "entry_points", lambda group: [])
    package = devices_module.PACKAGES[name]
    with pytest.raises(ValueError, match=f"device '{name}' is not installed; pip install {package}$"):
        feature_map(execution=qnodes(name))


def test_every_local_simulator_comes_from_pennylane_or_a_named_package():
    ours = {"default.qubit", "default.mixed", "reference.qubit", "lightning.qubit"}
    assert devices_module.LOCAL_SIMULATORS - ours <= set(devices_module.PACKAGES)
    assert ours <= set(installed_devices())


def test_single_precision_by_name():
    module = feature_map()
    expected = run(module, tokens())
    set_execution(module, qnodes("lightning.qubit", device_options={"c_dtype": "complex64"}))
    actual = run(module, tokens())
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert not torch.equal(actual[0], expected[0].clone())


@pytest.mark.parametrize(
    "name, broadcasts, states, channels",
    [
        ("default.qubit", True, True, False),
        ("lightning.qubit", False, True, False),
        ("default.mixed", True, False, True),
        ("reference.qubit", False, True, False),
    ],
)
def test_what_devices_can_do(name, broadcasts, states, channels):
    runner = Runner(name, 3, {"wires": 4})
    assert (runner.broadcasts, runner.gives_states, runner.gives_channels) == (broadcasts, states, channels)
    again = pickle.loads(pickle.dumps(runner))
    assert (again.broadcasts, again.gives_states, again.gives_channels) == (broadcasts, states, channels)


def test_results_that_do_not_fit_are_refused(monkeypatch):
    module = feature_map(execution=qnodes("lightning.qubit"))
    monkeypatch.setattr(module.executor.runner, "_execute", lambda tapes: [(0.0,)] * len(tapes))
    with pytest.raises(RuntimeError, match="lightning.qubit gave 1 results of 3"):
        module(tokens())
