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
