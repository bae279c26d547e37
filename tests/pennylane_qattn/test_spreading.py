"""Circuits spread over processes: the numbers and gradients of one process, and who cannot."""

import os
import pickle
import signal

import pennylane as qml
import pytest
import torch

from pennylane_qattn import Execution, Noise, build_attention, set_execution
from pennylane_qattn.devices import Runner
from pennylane_qattn.spreading import _pool, spread


def results(execution, dtype=torch.float64):
    torch.manual_seed(2)
    attention = build_attention("qisa", embed_dim=6, num_heads=2, block_size=7, seed=3).to(dtype)
    set_execution(attention, execution)
    x = torch.randn(3, 7, 6, dtype=dtype, generator=torch.Generator().manual_seed(1)).requires_grad_()
    out = attention(x)
    out.square().sum().backward()
    return [out.detach(), x.grad, *(p.grad for p in attention.parameters())], attention


@pytest.mark.slow  # processes take their time to load torch and PennyLane
@pytest.mark.parametrize(
    ("device", "method", "noise"),
    [
        ("default.qubit", "parameter-shift", Noise()),  # broadcast
        ("lightning.qubit", "parameter-shift", Noise()),  # a tape for each input
        ("lightning.qubit", "adjoint", Noise()),
        ("default.mixed", "parameter-shift", Noise(depolarizing=0.1)),
    ],
)
def test_two_processes_give_the_numbers_of_one(device, method, noise):
    options = {"executor": "qnode", "device": device, "diff_method": method, "noise": noise}
    here, one = results(Execution(**options))
    spread_out, two = results(Execution(**options, processes=2))
    for expected, found in zip(here, spread_out, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    counts = [attention.value_map.executor.meter.executions for attention in (one, two)]
    assert counts[0] == counts[1] > 0


@pytest.mark.slow
def test_processes_do_run_the_circuits(monkeypatch):
    runner = results(Execution(executor="qnode", device="lightning.qubit", processes=2))[1].value_map.executor.runner

    def fails(*args):
        raise AssertionError("run in this process")

    monkeypatch.setattr(type(runner.device), "execute", fails)
    results(Execution(executor="qnode", device="default.qubit", diff_method="adjoint", processes=2))
    with pytest.raises(AssertionError, match="run in this process"):
        runner._execute(list(_tapes()))
    assert len(runner._spread("_execute", list(_tapes()))) == 5


def _tapes():
    for angle in range(5):
        yield qml.tape.QuantumScript([qml.RX(0.1 * angle, 0)], [qml.expval(qml.Z(0))])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shots": 7}, "with shots=7 several processes would draw the same numbers; leave processes out, or shots"),
        ({"diff_method": "backprop"}, "backprop runs within torch, .* use adjoint or parameter-shift"),
        ({"device_options": {"max_workers": 2}}, "give max_workers or processes, not both"),
        ({"executor": "folded"}, "folded circuits run on no device; leave processes out, or use executor qnode"),
    ],
)
def test_who_cannot_says_so_at_construction(options, message):
    attention = build_attention("qisa", embed_dim=6, num_heads=2, block_size=7)
    with pytest.raises(ValueError, match=message) as error:
        set_execution(attention, Execution(**{"executor": "qnode", "processes": 2, **options}))
    assert "\n" not in str(error.value)


def test_devices_elsewhere_and_options_that_cannot_travel():
    runner = Runner("default.qubit", 2, {})
    assert runner.why_not_spread() is None
    runner.options = {"rng": lambda: 1}
    assert "device_options of default.qubit cannot be handed to other processes" in runner.why_not_spread()
    runner.name = "ionq.qpu"
    assert runner.why_not_spread().startswith("ionq.qpu is no simulator of this machine")


def test_a_number_of_processes_that_is_none():
    with pytest.raises(ValueError, match="processes must be an integer of at least 1; got 0"):
        Execution(processes=0)


def test_auto_takes_a_method_that_can_be_spread():
    attention = build_attention("qisa", embed_dim=6, num_heads=2, block_size=7)
    (plan,) = set_execution(attention, Execution(executor="qnode", processes=2))
    assert plan.diff_method == "adjoint"


class Dies:
    def now(self, tapes):
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_a_process_that_dies_is_an_error_and_the_next_call_works():
    with pytest.raises(RuntimeError, match="one of the 2 processes that run circuits has died"):
        spread(pickle.dumps(Dies()), "now", [1, 2], 2)
    results(Execution(executor="qnode", device="lightning.qubit", processes=2))


@pytest.fixture(scope="module", autouse=True)
def _no_process_stays():
    yield
    if _pool.cache_info().currsize:
        _pool(2).shutdown()
        _pool.cache_clear()
