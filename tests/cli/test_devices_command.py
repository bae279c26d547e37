"""`qattn devices`: what it says of devices and methods, and that it is the planner that says it."""

import json

import pytest
import torch

from lightning_modules import cli, device_table
from lightning_modules.checkpoints import PlainCheckpointIO
from lightning_modules.language_model import LanguageModel
from lightning_modules.tokenizers import CharTokenizer
from pennylane_qattn import QSANN, Circuit, Execution
from pennylane_qattn.devices import PACKAGES, installed_devices
from pennylane_qattn.execution import make_executor
from pennylane_qattn.gradients import ParameterShift
from pennylane_qattn.planning import METHODS

PAIR = ("--device", "lightning.qubit", "--device", "default.mixed")


@pytest.fixture
def say(capsys):
    def say(*arguments, status=0):
        assert cli.main(["devices", *arguments]) == status
        return capsys.readouterr().out

    return say


@pytest.fixture
def plain(say):
    return lambda *arguments, **options: json.loads(say("--json", *arguments, **options))


def test_every_known_device_is_there(plain):
    found = plain()
    names = [device["name"] for device in found["devices"]]
    assert names == sorted({*installed_devices(), *PACKAGES})
    for device in found["devices"]:
        missing = device["name"] not in installed_devices()
        assert device["install"] == (f"pip install {PACKAGES[device['name']]}" if missing else None)
        if missing:
            assert device["problem"].endswith(device["install"]) and not device["answers"]
        else:
            assert set(device["answers"]) == {"amplitude", "angle"} and device["problem"] is None
    assert found["auto"]["angle"].startswith("folded in torch: ")
    assert "tried" not in found


def test_what_devices_can_do(plain):
    found = {device["name"]: device for device in plain(*PAIR, "--device", "default.qubit")["devices"]}
    can = {name: [d[what] for what in ("exact", "shots", "noise", "states")] for name, d in found.items()}
    assert can == {
        "lightning.qubit": ["float64", True, False, True],
        "default.mixed": ["float64", True, True, False],
        "default.qubit": ["float64", True, False, True],
    }
    picked = {name: device["picked"]["amplitude"] for name, device in found.items()}
    assert picked == {"lightning.qubit": "adjoint", "default.mixed": "backprop", "default.qubit": "backprop"}
    assert found["lightning.qubit"]["auto"]["amplitude"] == (
        "QNodes on lightning.qubit, gradients by adjoint, inputs by state: as asked for; adjoint is the fastest there"
    )
    methods = found["lightning.qubit"]["answers"]["amplitude"]
    assert not methods["backprop"]["works"]
    assert methods["backprop"]["why_not"] == "lightning.qubit has no backprop; use adjoint or parameter-shift"
    # counted by hand: forward; both ways of 3 rotations on each of 2 qubits; once for the state
    assert methods["parameter-shift"]["executions"] == 1 + 2 * 6 + 1
    # without states two for each of 3 numbers
    mixed = found["default.mixed"]["answers"]["amplitude"]["parameter-shift"]
    assert mixed["executions"] == 1 + 2 * 6 + 2 * 3 and mixed["input_gradient"] == "polarisation"
    # 3 rotations of the encoding among those of 3 qubits
    assert found["lightning.qubit"]["answers"]["angle"]["parameter-shift"]["executions"] == 1 + 2 * (3 + 9)


@pytest.mark.parametrize("encoding", device_table.EXAMPLES)
def test_what_is_said_to_work_works_and_nothing_else(plain, encoding):
    """Executors are made for every pair: the table's word is theirs."""
    circuit = Circuit(3, device_table.EXAMPLES[encoding], encoding=encoding)
    for device in plain(*PAIR)["devices"]:
        for method in METHODS:
            answer = device["answers"][encoding][method]
            execution = Execution(executor="qnode", device=device["name"], diff_method=method)
            if answer["works"]:
                executor = make_executor([circuit], execution)
                assert executor.plan.input_gradient == answer["input_gradient"]
                before = executor.meter.executions
                x = torch.tensor([[[0.3, -0.5, 0.7]]], dtype=torch.float64, requires_grad=True)
                weights = torch.full((1, *circuit.weight_shape), 0.4, dtype=torch.float64, requires_grad=True)
                executor.expectations(x, weights).sum().backward()
                assert executor.meter.executions - before <= answer["executions"]
                if method in ("adjoint", "parameter-shift"):
                    assert executor.meter.executions - before == answer["executions"]
            else:
                with pytest.raises(ValueError) as refusal:
                    make_executor([circuit], execution)
                assert str(refusal.value) == answer["why_not"] and "; use " in answer["why_not"]


def test_the_table(say, monkeypatch):
    monkeypatch.setenv("COLUMNS", "500")
    text = say()
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100
    assert text.count("lightning.qubit") >= 3
    (header,) = [line for line in lines if "parameter-shift" in line and "hadamard" in line and "works" not in line]
    assert header.split() == list(METHODS)
    rows = [line.split() for line in lines if line.startswith("lightning.qubit  ")]
    assert rows[0][1:5] == ["float64", "yes", "no", "yes"]
    note = rows[1][2]
    assert rows[1][1:] == f"no {note} works, 3 works, 14 works, 14 works, 4 works, 8".split()
    assert f"{note} the device has no backprop; use adjoint or parameter-shift" in lines
    assert not any(line.startswith("?: ") for line in lines)
    if "cirq.simulator" not in installed_devices():
        assert "  pip install pennylane-cirq: cirq.mixedsimulator, cirq.simulator" in lines
    assert "  folded in torch: exact, and its matrices are small" in lines


def test_of_a_preset(plain):
    found = plain("--preset", "qisa-16", "--attention", "overlap", *PAIR)
    lightning, mixed = found["devices"]
    assert found["circuits"] == "qisa-16, overlap attention"
    (label,) = lightning["answers"]
    assert label == "query, key (amplitude)"
    assert lightning["answers"][label]["adjoint"]["works"]
    assert not any(answer["works"] for answer in mixed["answers"][label].values())
    assert "default.mixed gives none" in mixed["auto"][label] and mixed["picked"][label] is None


def test_of_a_checkpoint(plain, tmp_path):
    torch.manual_seed(0)
    sizes = dict(num_layers=2, num_heads=1, embed_dim=3, block_size=5)
    attention = QSANN(encoding="angle", ansatz="strongly-entangling")
    model = LanguageModel(CharTokenizer("ab"), attention=attention, **sizes)
    content = {"state_dict": model.state_dict(), "hyper_parameters": model.to_plain()}
    PlainCheckpointIO().save_checkpoint(content, tmp_path / "model.ckpt")
    (device,) = plain("--checkpoint", str(tmp_path / "model.ckpt"), "--device", "lightning.qubit")["devices"]
    assert list(device["answers"]) == ["query, key (angle)", "value (angle)"]
    # 3 rotations of the encoding, and 3 angles for each of 3 qubits
    assert device["answers"]["value (angle)"]["parameter-shift"]["executions"] == 1 + 2 * (3 + 9)


def test_try_runs_every_pair(plain, say):
    tried = plain("--try", "--device", "lightning.qubit")["tried"]
    for label, rows in tried.items():
        assert [row["method"] for row in rows] == list(METHODS[1:])
        for row in rows:
            assert row["outcome"] == "agrees" and row["encoding"] == label
            assert row["executions"] > 0 and row["milliseconds"] > 0
            assert 0 < row["errors"]["values"] <= row["allowed"]["values"] == 1e-9
    text = say("--try", "--device", "lightning.qubit")
    assert max(map(len, text.splitlines())) <= 100
    assert text.count("largest errors against folding") == 2 and "ms a token" in text and "wrong" not in text


def test_try_fails_where_something_is_wrong(capsys, monkeypatch):
    called = ParameterShift.__call__
    monkeypatch.setattr(ParameterShift, "__call__", lambda *args: [j * 1.001 for j in called(*args)])
    assert cli.main(["devices", "--try", "--device", "lightning.qubit"]) == 1
    captured = capsys.readouterr()
    assert captured.out.count("wrong") == 2
    lines = [line for line in captured.err.splitlines() if line.startswith("qattn: ")]
    assert len(lines) == 3 and all(line.startswith("qattn: lightning.qubit, parameter-shift, a") for line in lines)
    assert "gradient by angles: largest error" in lines[0]


def test_a_device_elsewhere_is_asked_nothing_that_runs(plain, say, monkeypatch):
    monkeypatch.setattr(device_table, "LOCAL_SIMULATORS", frozenset())
    monkeypatch.setattr("pennylane_qattn.devices.LOCAL_SIMULATORS", frozenset())
    monkeypatch.setattr("pennylane_qattn.devices.Runner.run", lambda *args: pytest.fail("a circuit was run"))
    monkeypatch.setattr("pennylane_qattn.devices.Runner._execute", lambda *args: pytest.fail("a circuit was run"))
    (device,) = plain("--try", "--device", "lightning.qubit")["devices"]
    assert [device[what] for what in ("simulator", "exact", "shots", "noise", "states")] == [False] + [None] * 4
    answers = device["answers"]["amplitude"]
    assert answers["parameter-shift"]["input_gradient"] == "polarisation"
    assert "adjoint needs a simulator on this machine" in answers["adjoint"]["why_not"]
    text = say("--device", "lightning.qubit")
    assert "\n?: not asked, since circuits on it may cost money" in text
    assert "  lightning.qubit: QNodes on the device, gradients by parameter-shift, inputs by polarisation: as" in text


def test_bad_input(refused):
    assert refused("devices", "--device", "foo").startswith("unknown device 'foo'; choose from ")
    assert refused("devices", "--attention", "qisa").startswith("circuits come from a checkpoint or from a preset")
    assert refused("devices", "--preset", "qisa-16").startswith("a preset is a size without an attention")
    message = refused("devices", "--preset", "qisa-16", "--attention", "classical")
    assert message == "classical attention has no circuits; choose one that has, such as qisa"
    assert refused("devices", "--checkpoint", "nowhere.ckpt").startswith("there is no checkpoint 'nowhere.ckpt'")
