"""What comes from strangers runs no code: checkpoints, configs, folders of Hugging Face, tokenizers."""

import copy
import importlib
import json
import os
import sys
from pathlib import Path

import pytest
import torch
import yaml

from lightning_modules import cli
from lightning_modules.checkpoints import read_checkpoint
from lightning_modules.language_model import LanguageModel
from lightning_modules.trust import only
from pennylane_qattn import ANSATZE, ATTENTION

LAST = "runs/a/checkpoints/last.ckpt"
#: A module that leaves a file when it is imported.
EVIL = """\
import pathlib
pathlib.Path("harm").touch()
import lightning as L
import pennylane as qml
from torch import nn
from pennylane_qattn import QISA

class Mechanism(QISA):
    pass

class Callback(L.Callback):
    pass

def circuit(weights, wires):
    qml.RX(weights[0], wires[0])

def factory():
    return nn.Embedding(7, 7)
"""


@pytest.fixture(autouse=True)
def evil(tmp_path, monkeypatch):
    """`evil` can be imported; a test is over as nothing was trusted."""
    (tmp_path / "evil.py").write_text(EVIL)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("evil", None)
    yield
    for name in ("evil", "evi"):
        sys.modules.pop(name, None)
    only(())


def assert_harmless():
    assert not Path("harm").exists() and "evil" not in sys.modules


class Harm:
    def __reduce__(self):
        return os.mkdir, ("harm",)


def malicious(path, content=None):
    torch.save({**(content or {}), "callbacks": {"x": Harm()}}, path)
    return str(path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The checkpoint of a run."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 12)
    options = f"--data.corpus {folder}/text.txt --model.attention qisa --model.num_layers 1 --model.block_size 5"
    limits = f"--trainer.max_steps 1 --trainer.accelerator cpu --run a --trainer.default_root_dir {folder}"
    assert cli.main(["fit", *options.split(), *limits.split()]) == 0
    return read_checkpoint(folder / "a" / "checkpoints" / "last.ckpt")


# --- checkpoints ------------------------------------------------------------------------------------------------

#: Every command that reads a checkpoint, with CKPT for it.
READERS = [
    "fit --ckpt_path CKPT --run b",
    "validate --ckpt_path CKPT",
    "test --ckpt_path CKPT",
    "predict --ckpt_path CKPT",
    "generate --checkpoint CKPT --prompt a",
    "certify CKPT",
    "report CKPT",
    "cross-check --checkpoint CKPT",
    "noise-sweep --checkpoint CKPT",
    "grover --checkpoint CKPT",
    "draw --checkpoint CKPT",
    "resources --checkpoint CKPT",
    "export-qasm --checkpoint CKPT --text a",
    "export-hf --checkpoint CKPT --output hf",
]


def test_all_readers_are_here():
    takers = {name for name, command in cli.COMMANDS.items() if "runs/" in command.example}
    assert takers - {"merge"} <= {reader.split()[0] for reader in READERS} - {"fit"}


@pytest.mark.parametrize("reader", READERS)
def test_no_command_runs_what_is_pickled(refused, tmp_path, reader):
    path = malicious(tmp_path / "evil.ckpt")
    line = refused(*reader.replace("CKPT", path).split())
    assert line.startswith("refused ") and "mkdir" in line and "plain data only" in line
    assert_harmless()
    torch.load(path, weights_only=False)
    assert Path("harm").exists()  # it would have worked


def test_a_run_does_not_go_on_from_what_is_pickled(fit, refused, tiny):
    assert fit("--run", "a", "--trainer.max_steps", "3") == 0
    malicious(LAST, read_checkpoint(LAST))
    assert "refused" in refused("fit", *tiny, "--run", "a", "--ckpt_path", "last")
    assert_harmless()


NAMED = [
    ("attention", {"class_path": "evil.Mechanism"}),
    ("attention", {"kind": "attention", "name": "evil.Mechanism"}),
    ("attention", {"kind": "evil.Mechanism", "name": "qisa"}),
    ("attention.ansatz", {"kind": "ansatz", "name": "function", "function": "evil:circuit", "weight_shape": [1]}),
    ("attention.ansatz", {"class_path": "evil.circuit", "init_args": {}}),
    ("tokenizer", {"class_path": "evil.Callback"}),
    ("gpt", {"class_path": "evil.Callback"}),
    ("optimisation", {"class_path": "evil.Callback"}),
    ("execution", {"class_path": "evil.Callback"}),
    ("_class_path", "evil.Mechanism"),
    ("_instantiator", "evil.factory"),
]


@pytest.mark.parametrize(("place", "value"), NAMED)
def test_a_checkpoint_names_no_code(trained, capsys, place, value):
    content = copy.deepcopy(trained)
    *parents, name = place.split(".")
    inner = content["hyper_parameters"]
    for parent in parents:
        inner = inner[parent]
    is_known = name in inner
    inner[name] = value
    torch.save(content, "a.ckpt")
    for command in (["generate", "--prompt", "the", "--max_new_tokens", "2"], ["resources"]):
        capsys.readouterr()
        assert (cli.main([*command, "--checkpoint", "a.ckpt"]) == 2) is is_known  # what means nothing is not looked at
        assert "Traceback" not in capsys.readouterr().err
        assert_harmless()


def test_data_that_a_checkpoint_describes_name_no_code(fit, capsys):
    assert fit("--run", "a", "--trainer.max_steps", "1") == 0
    content = read_checkpoint(LAST)
    content["data"] = {**content["data"], "tokenizer": "evil.Callback", "stride": {"class_path": "evil.Callback"}}
    torch.save(content, LAST)
    assert cli.main(["validate", "--ckpt_path", LAST]) == 0
    assert_harmless()


# --- configs ----------------------------------------------------------------------------------------------------

FUNCTION = {"class_path": "pennylane_qattn.FunctionAnsatz", "init_args": {"function": "PATH", "weight_shape": [1]}}


def function(path):
    own = {**FUNCTION, "init_args": {**FUNCTION["init_args"], "function": path}}
    return {"class_path": "pennylane_qattn.QISA", "init_args": {"ansatz": own}}


CONFIGS = [
    ({"model": {"attention": {"class_path": "evil.Mechanism"}}}, "evil.Mechanism"),
    ({"model": {"attention": function("evil:circuit")}}, "evil.circuit"),
    ({"model": {"attention": function("evil.circuit")}}, "evil.circuit"),
    ({"data": {"tokenizer": {"class_path": "evil.Callback"}}}, "evil.Callback"),
    ({"trainer": {"callbacks": [{"class_path": "evil.Callback"}]}}, "evil.Callback"),
    ({"trainer": {"callbacks": {"class_path": "evil.Callback"}}}, "evil.Callback"),
    ({"trainer": {"logger": {"class_path": "evil.Callback"}}}, "evil.Callback"),
    ({"trainer": {"plugins": [{"class_path": "evil.Callback"}]}}, "evil.Callback"),
    ({"trainer": {"strategy": {"class_path": "evil.Callback"}}}, "evil.Callback"),
    ({"trainer": {"profiler": {"class_path": "evil.Callback"}}}, "evil.Callback"),
    (
        {
            "trainer": {
                "callbacks": [
                    {
                        "class_path": "lightning.pytorch.callbacks.LambdaCallback",
                        "init_args": {"on_fit_start": "evil.factory"},
                    }
                ]
            }
        },
        "evil.factory",
    ),
]


def written(content):
    Path("config.yaml").write_text(json.dumps(content))
    return "config.yaml"


@pytest.mark.parametrize(("content", "path"), CONFIGS)
def test_a_config_names_no_code_from_elsewhere(refused, content, path, tiny):
    text, attention = tiny[1], ["--model.attention", "classical"]
    options = [option for option in tiny if option not in attention] if "model" in content else tiny
    line = refused("fit", *options, "--config", written(content))
    remedy = f"'{path}' is code from elsewhere, and importing it would run it; if you trust it, add --trust evil"
    assert line.endswith(remedy)
    assert_harmless()
    if "model" in content:
        attention = content["model"]["attention"]
        arguments = ["--config", written({"mechanisms": {"a": attention}, "fit": {"data": {"corpus": text}}})]
    else:
        own = {**content, "data": {"corpus": text, **content.get("data", {})}}
        arguments = ["--mechanisms", '{"a": "classical"}', "--fit", written(own)]
    assert refused("compare", *arguments).endswith(remedy)
    assert_harmless()
    assert not Path("runs").exists()


def test_help_about_code_from_elsewhere_imports_nothing(refused):
    assert "add --trust evil" in refused("fit", "--model.attention.help", "evil.Mechanism")
    assert_harmless()


@pytest.mark.parametrize("options", [["--trust", "evil"], ["--trust=evil.Mechanism", "--trust", "evil.Callback"]])
def test_what_is_trusted_is_imported(fit, options):
    callback = {"trainer": {"callbacks": [{"class_path": "evil.Callback"}]}}
    assert fit("--config", written(callback), "--model.attention", "evil.Mechanism", "--run", "a", *options) == 0
    assert Path("harm").exists()
    config = yaml.safe_load(Path("runs/a/config.yaml").read_text())
    assert config["model"]["attention"]["class_path"] == "evil.Mechanism" and "trust" not in config


def test_trust_is_for_one_command_and_what_lies_under_it(fit, refused, tiny):
    config = written({"model": {"attention": function("evil:circuit")}})
    options = [option for option in tiny if option not in ("--model.attention", "classical")]
    Path("evi.py").write_text("def il(): ...")
    assert "add --trust evil" in refused("fit", *options, "--config", config, "--trust", "evi", "--trust", "evi.il")
    assert_harmless()
    assert cli.main(["fit", *options, "--config", config, "--run", "a", "--trust", "evil"]) == 0
    assert Path("harm").exists()
    assert "add --trust evil" in refused("fit", *options, "--config", config, "--run", "b")
    assert cli.main(["validate", "--ckpt_path", "runs/a"]) == 0  # a checkpoint has the gates


def test_a_comparison_hands_trust_on(tiny, capsys):
    fit = {
        "data": {"corpus": tiny[1], "batch_size": 4, "eval_windows": 7},
        "model": {"num_layers": 1, "num_heads": 1, "embed_dim": 4, "block_size": 5},
        "trainer": {"max_steps": 2, "val_check_interval": 1, "accelerator": "cpu"},
    }
    mechanisms = {"a": function("evil:circuit")}
    comparison = written({"mechanisms": mechanisms, "fit": fit, "sample_length": 3})
    assert cli.main(["compare", "--config", comparison, "--dry_run", "true", "--trust", "evil"]) == 0
    assert Path("harm").exists()


def test_a_comparison_takes_a_class_by_its_path_alone(refused, tiny, tmp_path, monkeypatch):
    # of a name that no other test has trusted: what a process no longer trusts it never trusts again
    (tmp_path / "evil_too.py").write_text(EVIL)
    monkeypatch.delitem(sys.modules, "evil_too", raising=False)
    small = ["--fit.data.corpus", tiny[1], "--fit.model", '{"num_layers": 1, "embed_dim": 4, "block_size": 5}']
    compare = ["compare", "--dry_run", "true", *small, "--fit.trainer", '{"max_steps": 2, "val_check_interval": 1}']
    comparison = [*compare, "--mechanisms", '{"a": "QISA", "b": "evil_too.Mechanism"}']
    line = refused(*comparison)
    assert "'evil_too.Mechanism' is code from elsewhere" in line and line.endswith("add --trust evil_too")
    assert_harmless()
    assert cli.main([*comparison, "--trust", "evil_too"]) == 0
    assert Path("harm").exists()
    for wrong in ("evil_too.Mechanis", "evil_too.factory", "evil_too.a b", ".", ""):
        line = refused(*compare, "--mechanisms", json.dumps({"a": wrong}), "--trust", "evil_too")
        assert repr(wrong) in line or wrong.split(".")[-1] in line
    line = refused(*compare, "--mechanisms", '{"a": "evil.a b"}', "--trust", "evil_too")
    assert line.endswith("'evil.a b' is no import path; write it as in mine.Model")


@pytest.mark.parametrize("value", ["evil", ["evil"]])
def test_a_config_gives_no_trust(refused, tiny, value):
    content = {"trust": value, "trainer": {"callbacks": [{"class_path": "evil.Callback"}]}}
    assert "add --trust evil" in refused("fit", *tiny, "--config", written(content))
    assert "a config cannot give trust" in refused("fit", *tiny, "--config", written({"trust": value}))
    assert "a config cannot give trust" in refused("compare", "--config", written({"trust": value}), "--trust", "json")
    assert_harmless()


@pytest.mark.parametrize("prefix", ["", "a/b", "evil:f", "jsonargparse", "*"])
def test_trust_is_an_import_path(refused, tiny, prefix):
    line = refused("fit", *tiny, f"--trust={prefix}")
    assert line == f"--trust takes an import path, as mine or mine.models; got {prefix!r}"
    assert "--trust takes" in refused("fit", *tiny, "--trust")


@pytest.mark.parametrize(
    ("prefix", "reason"),
    [
        ("evi", "there is no module 'evi'; start qattn in the folder that holds it, or put that on PYTHONPATH"),
        ("evi.l", "there is no module 'evi'"),
        ("evil.circ", "'evil' has no 'circ'; check the name"),
        ("broken", "cannot import 'broken': ZeroDivisionError: division by zero (QATTN_DEBUG=1 shows where)"),
        ("lacking", "cannot import 'lacking': ModuleNotFoundError: No module named 'nowhere'"),
    ],
)
def test_what_cannot_be_imported(refused, tiny, prefix, reason):
    Path("broken.py").write_text("1 / 0")
    Path("lacking.py").write_text("import nowhere")
    for command in (["fit", *tiny], ["certify", "qisa"]):
        assert f"--trust {prefix}: {reason}" in refused(*command, "--trust", prefix)


# --- names of one's own ------------------------------------------------------------------------------------------

OWN = """\
import dataclasses
import pathlib
import pennylane as qml
from pennylane_qattn import ANSATZE, ATTENTION, Ansatz
from pennylane_qattn.mechanisms import ScaledDot

pathlib.Path("imported").touch()

@ATTENTION.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class Own(ScaledDot):
    name = "own"
    values: str = "circuit"

@ANSATZE.register
@dataclasses.dataclass(frozen=True)
class Zigzag(Ansatz):
    name = "zigzag"
    def shape(self, num_wires):
        return (num_wires,)
    def __call__(self, weights, wires):
        for weight, wire in zip(weights, wires):
            qml.RX(weight, wire)
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """`own` is in this folder, and was never imported; a function that forgets it again."""
    (tmp_path / "own.py").write_text(OWN)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def forget():
        ATTENTION.pop("own", None)
        ANSATZE.pop("zigzag", None)
        sys.modules.pop("own", None)
        (tmp_path / "imported").unlink(missing_ok=True)
        importlib.invalidate_caches()

    forget()
    yield forget
    forget()


@pytest.fixture
def trained_own(own, tiny):
    """A run with an attention and an ansatz of one's own."""
    options = [*tiny, "--model.attention", "own", "--model.attention.ansatz", "zigzag", "--trainer.max_steps", "1"]
    assert cli.main(["fit", *options, "--run", "own", "--trust", "own"]) == 0
    own()
    return "runs/own/checkpoints/last.ckpt"


#: What keeps the slower readers short.
SHORT = {
    "report": "--sample_length 3 --output out",
    "cross-check": "--steps 1 --batch 1 --windows 1 --evaluate_on lightning.qubit --gradients lightning.qubit:adjoint",
    "noise-sweep": "--shots 9 --depolarizing --amplitude_damping --readout --repetitions 2 --windows 1 --output out",
    "grover": "--windows 1 --output out",
    "draw": "--output out.png",
    "export-qasm": "--output out",
    "generate": "--max_new_tokens 2",
}


def test_names_of_ones_own(trained_own, own, refused, tiny, capsys):
    """Every command that reads a checkpoint imports what registers its names where that is trusted, and only there."""
    for reader in READERS:
        command, *arguments = reader.replace("CKPT", trained_own).split()
        if command == "fit":
            continue
        arguments += SHORT.get(command, "").split()
        line = refused(command, *arguments)
        assert "unknown attention 'own'; choose from" in line, reader
        assert line.endswith("; if a module of yours registers it, add --trust MODULE"), reader
        assert not Path("imported").exists() and "own" not in sys.modules
        if command == "export-hf":
            pytest.importorskip("transformers")
        assert cli.main([command, *arguments, "--trust", "own"]) == 0, capsys.readouterr().err
        assert Path("imported").exists()
        own()


def test_names_of_ones_own_to_begin_with(own, refused, tiny, capsys):
    remedy = "; if a module of yours registers it, add --trust MODULE"
    assert refused("fit", *tiny, "--model.attention", "own").endswith(remedy)
    by_path = "'own.Own' is code from elsewhere, and importing it would run it; if you trust it, add --trust own"
    assert refused("fit", *tiny, "--model.attention", "own.Own") == by_path
    mechanisms = {"mine": "own", "line": {"class_path": "pennylane_qattn.QISA", "init_args": {"ansatz": "zigzag"}}}
    comparison = ["--dry_run", "true", "--fit.data.corpus", tiny[1]]
    comparison = ["compare", "--config", written({"mechanisms": mechanisms}), *comparison]
    assert remedy in refused(*comparison)
    assert refused("new", "--attention", "own").endswith(remedy)
    assert refused("resources", "--preset", "qisa-16", "--attention", "own").endswith(remedy)
    assert not Path("imported").exists()
    assert cli.main([*comparison, "--trust", "own"]) == 0
    assert cli.main(["certify", "own", "--trust", "own"]) == 0
    assert cli.main(["new", "--attention", "own", "--trust", "own", "--output", "own.yaml"]) == 0
    capsys.readouterr()
    own()
    options = [option for option in tiny if option not in ("--model.attention", "classical")]
    assert cli.main(["fit", "--config", "own.yaml", *options, "--trainer.max_steps", "1", "--trust", "own"]) == 0
    assert "own GPT" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text",
    [
        'model: !!python/object/apply:os.mkdir ["harm"]',
        'run: !!python/object/new:os.mkdir ["harm"]',
        "trainer: {callbacks: !!python/name:evil.Callback }",
        "trainer: {callbacks: !!python/module:evil }",
    ],
)
def test_tags_of_yaml_run_nothing(refused, tiny, text):
    Path("tags.yaml").write_text(text)
    for command in (["fit", *tiny], ["compare"], ["validate"]):
        assert "could not determine a constructor for the tag" in refused(*command, "--config", "tags.yaml")
    value = text.partition(" ")[2] if text.startswith(("model", "run")) else "!!python/module:evil"
    assert "cannot be read" in refused("certify", "qisa", "--option", f"split={value}")
    assert_harmless()


# --- folders and tokenizers -------------------------------------------------------------------------------------


def folder(**config):
    Path("hf").mkdir()
    sizes = {"n_embd": 8, "n_head": 2, "n_layer": 1, "n_positions": 8, "vocab_size": 11}
    Path("hf/config.json").write_text(json.dumps({**sizes, **config}))
    return "hf"


def test_a_folder_of_hugging_face_brings_no_code(refused, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # who would say yes
    names = {"AutoConfig": "evil.Callback", "AutoModelForCausalLM": "evil.Mechanism"}
    path = folder(model_type="mine", auto_map=names)
    Path("hf/evil.py").write_text(EVIL)
    assert refused("certify", path).startswith("refused 'hf': it brings code of its own; import that yourself")
    assert_harmless()


def test_weights_of_hugging_face_are_data(refused):
    pytest.importorskip("transformers")
    path = folder(model_type="gpt2")
    malicious("hf/pytorch_model.bin")
    assert refused("certify", path).startswith("refused 'hf': its weights are no plain data")
    assert_harmless()
    Path("hf/model.safetensors").write_bytes(b"\xff" * 8 + b"{}" * 50)
    assert "cannot load 'hf': SafetensorError" in refused("certify", path)


def test_a_tokenizer_is_data(refused, tiny):
    described = {"class_path": "evil.Callback", "model": {"type": "evil.Callback", "vocab": {}, "merges": []}}
    for content in (json.dumps(described), "!!python/module:evil", "\0" * 99):
        Path("tokenizer.json").write_text(content)
        assert "not the content of a tokenizer.json" in refused("fit", *tiny, "--data.tokenizer", "tokenizer.json")
        Path("tokenizer.json").unlink()
    malicious("tokenizer.json")
    assert "cannot read a tokenizer" in refused("fit", *tiny, "--data.tokenizer", "tokenizer.json")
    assert_harmless()


def test_what_is_named_by_hand_is_trusted_by_hand(capsys):
    assert cli.main(["certify", "evil:factory"]) == 0
    assert Path("harm").exists() and "causal" in capsys.readouterr().out


def test_a_model_reads_the_same_in_python(tmp_path):
    with pytest.raises(ValueError, match="refused"):
        LanguageModel.load_from_checkpoint(malicious(tmp_path / "evil.ckpt"))
    assert_harmless()
