"""Configs that are none, and configs with values of the wrong kind: one line, and no run."""

import random

import pytest
import yaml

from lightning_modules import cli

NO_CONFIGS = {
    "empty": b"",
    "binary": bytes(random.Random(0).choices(range(256), k=300)),
    "list": b"- a\n- b\n",
    "number": b"42\n",
    "NUL": b"a: \0\n",
    "tab": b"\tx: 1",
    "in itself": b"a: &a [*a]\n",
    "deep": b"a: " + b"[" * 3000 + b"]" * 3000,
    "Latin-1": "a: é".encode("latin-1"),
    "unknown": b"nonsense: {deep: [1, {x: 2}]}\n",
    "null": b"model: null\ndata: null\ntrainer: null\n",
    "keys": b"1: 2\n? [a]\n: b\n",
}
ODD = [-1, -3.5, float("nan"), float("inf"), "x", [], {}, [[]], {"a": 1}, [1, "b", None], "\0", 10**30]


@pytest.mark.parametrize("command", ["fit", "compare", "certify"])
@pytest.mark.parametrize("content", NO_CONFIGS.values(), ids=NO_CONFIGS)
def test_a_file_that_is_no_config(refused, tmp_path, command, content):
    (tmp_path / "c.yaml").write_bytes(content)
    assert len(refused(command, "--config", "c.yaml")) < 300
    if command == "certify":  # a file that is neither a checkpoint nor a module
        assert len(refused(command, "c.yaml")) < 300


def options(config, before=()):
    for name, value in config.items():
        yield (*before, name)
        if isinstance(value, dict):
            yield from options(value, (*before, name))


@pytest.mark.timeout(60)
def test_values_of_any_kind(fit, capsys, tmp_path):
    """Whether a value is refused or taken, there is no traceback and no other exit status."""
    assert fit("--run", "a", "--trainer.max_steps", "1") == 0
    good = (tmp_path / "runs/a/config.yaml").read_text()
    draw = random.Random(0)
    names = list(options(yaml.safe_load(good)))
    refusals = 0
    for _ in range(25):
        config, name, value = yaml.safe_load(good), draw.choice(names), draw.choice(ODD)
        config["run"], part = "b", config
        for key in name[:-1]:
            part = part[key]
        part[name[-1]] = value
        (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
        capsys.readouterr()
        status = cli.main(["fit", "--config", "c.yaml", "--overwrite", "--trainer.max_steps", "1"])
        captured = capsys.readouterr()
        lines = [line for line in captured.err.splitlines() if line.startswith("qattn: error: ")]
        told = f"{name}: {value!r}: {status}: {captured.err}"
        assert (status, len(lines)) in ((0, 0), (2, 1)) and "Traceback" not in captured.err, told
        refusals += status == 2
    assert refusals > 15


COMPARISON = {
    "title": "t",
    "output": "out",
    "mechanisms": {"classical": "classical", "qisa": {"class_path": "pennylane_qattn.QISA"}},
    "seeds": [0],
    "sizes": {"a": {}},
    "corpora": {"a": {}},
    "twins": True,
    "matched_by": "head",
    "ablations": ["frozen"],
    "ablate": ["qisa"],
    "learning_rates": [0.1],
    "tuning_steps": 3,
    "tuning_seed": 5,
    "evaluate": "last",
    "split": None,
    "allow_noncausal": False,
    "timing_rounds": 0,
    "shard": "1/2",
    "overwrite": False,
    "prompt": None,
    "sample_length": 3,
    "temperature": 1.0,
    "sentence": None,
    "notes": ["n"],
}
NAMES = ["", "a/b", "/a", "..", ".", "a\0", "x" * 300]
MORE = [None, True, "", "a/b", "../up", [""], [float("nan")], [10**30], {1: 2}, {"a": {"embed_dim": 10**30}}, [1e308]]


def test_values_of_any_kind_for_a_comparison(tiny, capsys, tmp_path):
    fit = {
        "model": {"num_layers": 1, "embed_dim": 4, "block_size": 5},
        "data": {"corpus": "text.txt", "eval_windows": 7},
        "trainer": {"max_steps": 1, "accelerator": "cpu"},
    }
    draw = random.Random(0)
    odd = [(name, value) for name in COMPARISON for value in (*ODD, *MORE)]
    odd = [*((name, None) for name in COMPARISON), *draw.sample(odd, 40)]
    odd += [(kind, {name: "qisa"}) for kind in ("mechanisms", "sizes", "corpora") for name in NAMES]
    refusals = 0
    for name, value in odd:
        (tmp_path / "c.yaml").write_text(yaml.safe_dump({**COMPARISON, "fit": fit, "dry_run": True, name: value}))
        capsys.readouterr()
        status = cli.main(["compare", "--config", "c.yaml"])
        error = capsys.readouterr().err
        lines = [line for line in error.splitlines() if line.startswith("qattn: error: ")]
        told = f"{name}: {value!r}: {status}: {error}"
        assert (status, len(lines)) in ((0, 0), (2, 1)) and "Traceback" not in error, told
        assert not (status == 2 and "QATTN_DEBUG" in error), told
        refusals += status == 2
    assert refusals > 40 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["mechanisms", "sizes", "corpora"])
def test_names_that_are_no_folders(refused, tmp_path, kind, name):
    content = {"mechanisms": {"classical": "classical"}, kind: {name: {"mechanisms": "qisa"}.get(kind, {})}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({**content, "dry_run": True}))
    assert "is a folder's name, " in refused("compare", "--config", "c.yaml")


#: Of which none will do for the options that take a number.
NO_NUMBERS = ["-1", "-3.5", "nan", "-inf", "x", "", "[]", "\0", "a/b", "true", "x" * 5000, "9" * 5000]
HUGE = ["1" + "0" * 30, str(10**14)]


@pytest.mark.parametrize("name", ["embed_dim", "num_heads", "block_size", "length", "batch_size", "time_limit", "seed"])
def test_numbers_of_any_kind_for_a_certificate(refused, name):
    sizes = [] if name in ("time_limit", "seed", "block_size", "length") else HUGE
    for value in (*NO_NUMBERS, *sizes):
        if (name, value) != ("time_limit", "9" * 5000):  # which is infinity, and no limit
            assert "QATTN_DEBUG" not in refused("certify", "qisa", f"--{name}={value}"), value


@pytest.mark.parametrize(
    "value", ["", "x", "=", "bias=", "bias=nan", "bias=[", "ansatz=nope", "a=b", "\0=1", "x" * 5000]
)
def test_options_of_any_kind_for_a_certificate(refused, value):
    refused("certify", "qisa", f"--option={value}")
    refused("certify", "qisa", f"--modes={value}")


@pytest.mark.parametrize(
    "target", ["", ":", "a:", "a:b:c", "hf:", "hf:\0", "a b:c", ".:x", "/dev/null", "\0", "x" * 500]
)
def test_targets_of_any_kind(refused, target):
    refused("certify", target)
