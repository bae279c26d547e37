"""`qattn new`: whatever it writes, `qattn fit` takes as it is, and the names in it are those of the registries."""

import re
import shlex
from dataclasses import dataclass

import pytest
import yaml

import pennylane_qattn
from lightning_modules import arguments, cli
from lightning_modules.checkpoints import read_checkpoint
from lightning_modules.corpora import CORPORA
from lightning_modules.gpt import PRESETS
from lightning_modules.option_names import names_of
from pennylane_qattn import ANSATZE, ATTENTION, ENCODINGS, QISA


@pytest.fixture(scope="module")
def parser():
    return cli.parser_of("fit")


@pytest.fixture
def new(capsys):
    """Runs `qattn new` with these arguments; gives the path of the config and its text."""

    def new(*options):
        capsys.readouterr()
        assert cli.main(["new", *options]) == 0
        *_, last = capsys.readouterr().out.splitlines()
        qattn, fit, config, path, *new.trusted = shlex.split(last)
        assert (qattn, fit, config) == ("qattn", "fit", "--config")
        with open(path, encoding="utf-8") as file:
            return path, file.read()

    return new


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("attention", ATTENTION)
def test_fit_takes_the_config_of_every_attention(new, parser, attention, preset):
    path, _ = new("--attention", attention, "--preset", preset)
    assert new.trusted == []
    model = arguments.parse(parser, ["--config", path]).model
    assert model.preset == preset
    cls = getattr(pennylane_qattn, model.attention.class_path.rsplit(".", 1)[-1])
    assert cls(**model.attention.init_args) == ATTENTION[attention]()


def test_it_says_what_else_a_line_may_be(new):
    _, text = new("--attention", "qisa")
    known = " ".join(re.sub(r"^ *# ?", "", line) for line in text.splitlines() if line.lstrip().startswith("#"))
    for name in (*ATTENTION, *PRESETS, *CORPORA, *ENCODINGS, *names_of("ansatz"), *names_of("values")):
        assert re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", known), name
    assert "function" in ANSATZE and "function" not in names_of("ansatz")  # which needs a function of one's own
    lines = text.splitlines()
    assert max(map(len, lines)) <= 120
    for before, line in zip(lines, lines[1:], strict=False):
        is_group = line.rstrip().endswith(":") or "class_path" in line
        assert line.lstrip().startswith("#") or is_group or before.lstrip().startswith("# "), line


def test_what_is_registered_appears_by_itself(new, monkeypatch):
    @dataclass(frozen=True, kw_only=True)
    class Mine(QISA):
        """Of a test.

        Args:
            colour: of the attention.
        """

        name = "mine"
        colour: str = "blue"

    monkeypatch.setitem(ATTENTION, "mine", Mine)
    _, text = new("--attention", "mine")
    assert "grover-sparse" in text and "mine." in text
    assert new.trusted == ["--trust", __name__.partition(".")[0]] and shlex.join(new.trusted) in text
    lines = [line.strip() for line in text.splitlines()]
    assert lines[lines.index("colour: blue") - 1] == "# of the attention."


def test_the_config_trains(new, text_file):
    path, text = new("--attention", "classical", "--corpus", str(text_file), "--output", "mine.yaml")
    assert path == "mine.yaml" and yaml.safe_load(text)["data"]["corpus"] == str(text_file)
    limits = ["--trainer.max_steps", "2", "--data.batch_size", "2", "--data.eval_windows", "3"]
    assert cli.main(["fit", "--config", path, *limits, "--model.num_layers", "1", "--trainer.accelerator", "cpu"]) == 0
    assert read_checkpoint("runs/mine/checkpoints/last.ckpt")["global_step"] == 2


def test_a_leaking_attention_is_allowed_and_labelled(new, capsys):
    _, text = new("--attention", "qisa-published", "--output", "a.yaml")
    assert yaml.safe_load(text)["allow_noncausal"] is True
    assert cli.main(["new", "--attention", "qisa-published", "--output", "b.yaml"]) == 0
    assert capsys.readouterr().out.startswith("LEAKS: ")
    _, text = new("--attention", "qisa", "--output", "c.yaml")
    assert yaml.safe_load(text)["allow_noncausal"] is False


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--attention", "quisa"], "unknown attention 'quisa'; choose from classical, gaussian, "),
        (["--preset", "gpt2"], "unknown preset 'gpt2'; choose from gpt1, gpt1-tiny, qisa-128, qisa-16"),
        (["--corpus", "pydocs"], "unknown corpus 'pydocs': there is no such file; choose from pydoc, shakespeare, "),
        (["--output", "there.yaml"], "'there.yaml' is there already; choose another --output, or replace it with"),
        (["--output", "there.yaml/a"], "cannot write 'there.yaml/a': "),
        (["--colour", "blue"], "unknown option 'colour'"),
    ],
)
def test_bad_input_writes_nothing(refused, tmp_path, options, message):
    (tmp_path / "there.yaml").write_text("mine")
    assert message in refused("new", *options)
    assert [path.name for path in tmp_path.iterdir()] == ["there.yaml"]
    assert (tmp_path / "there.yaml").read_text() == "mine"


def test_it_overwrites_when_asked(new, tmp_path):
    (tmp_path / "there.yaml").write_text("mine")
    assert new("--output", "there.yaml", "--overwrite")[1].startswith("# A config for qattn fit")
