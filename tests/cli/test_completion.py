"""`qattn completion`: the scripts, run by the shells that they are for."""

import argparse
import re
import shutil
import subprocess

import pytest

from lightning_modules import cli
from lightning_modules.gpt import PRESETS
from pennylane_qattn import ATTENTION

#: What bash does when the key is pressed at the end of a line.
PRESS = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
_shtab_qattn qattn "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD-1]}"
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    """The path of the script for a shell."""
    folder = tmp_path_factory.mktemp("completion")

    def script(shell, capsys):
        path = folder / shell
        if not path.exists():
            capsys.readouterr()
            assert cli.main(["completion", shell]) == 0
            path.write_text(capsys.readouterr().out)
        return str(path)

    return script


@pytest.fixture
def complete(script, capsys):
    def complete(*words):
        command = ["bash", "-c", PRESS, "bash", script("bash", capsys), *words]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stderr == ""
        return done.stdout.split()

    return complete


def test_commands(complete):
    assert complete("qattn", "") == list(cli.COMMANDS)
    assert complete("qattn", "no") == ["noise-sweep"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["fit", "--model.attention", ""], list(ATTENTION)),
        (["new", "--attention", ""], list(ATTENTION)),
        (["draw", "--attention", "ov"], ["overlap"]),
        (["certify", "ov"], ["overlap"]),
        (["fit", "--model.preset", ""], list(PRESETS)),
        (["resources", "--preset", "gpt1-"], ["gpt1-tiny"]),
        (["fit", "--data.corpus", "m"], ["markov"]),
        (["fit", "--data.shuffle", ""], ["windows", "epoch", "sequential"]),
        (["fit", "--model.decay_all", ""], ["true", "false"]),
        (["compare", "--evaluate", ""], ["best", "last"]),
        (["draw", "--map", "q"], ["query"]),
        (["completion", ""], ["bash", "zsh"]),
        (["fit", "--data.shuffle", "epoch", "--model.sched"], ["--model.schedule", "--model.schedule_steps"]),
        (["fit", "--output"], []),  # which fit does not list
        (["predict", "--outp"], ["--output"]),
    ],
)
def test_options_and_what_they_may_be(complete, words, expected):
    assert complete("qattn", *words) == expected


@pytest.mark.parametrize("words", [["report"], ["generate", "--checkpoint"], ["fit", "--config"], ["merge"]])
def test_files(complete, words, tmp_path):
    (tmp_path / "a-file.yaml").touch()
    assert complete("qattn", *words, "a-f") == ["a-file.yaml"]


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_option_that_help_lists_is_completed(complete, capsys, name):
    completed = complete("qattn", name, "--")
    capsys.readouterr()
    assert cli.main([name, "--help"]) == 0
    listed = re.findall(r"^  (?:-\w[^-]*, )?(--[\w.-]+)", capsys.readouterr().out, re.MULTILINE)
    assert len(listed) >= 1 and not set(listed) - set(completed)


@pytest.mark.skipif(shutil.which("zsh") is None, reason="there is no zsh here")
def test_zsh_reads_its_script(script, capsys):
    path = script("zsh", capsys)
    with open(path, encoding="utf-8") as file:
        text = file.read()
    assert text.startswith("#compdef qattn\n") and f"({' '.join(ATTENTION)})" in text
    done = subprocess.run(["zsh", "-n", path], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_unknown_shell(refused):
    assert "argument shell: invalid choice: 'fish' (choose from 'bash', 'zsh')" in refused("completion", "fish")


# --- the parsers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_a_command_hands_its_parser_over_and_runs_nothing(name, tmp_path, capsys):
    parser = cli.parser_of(name)
    assert isinstance(parser, argparse.ArgumentParser) and parser.prog == f"qattn {name}"
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr().out == ""
    assert cli.main([name, "--help"]) == 0  # it reads its arguments again


def test_a_command_without_such_a_parser(monkeypatch):
    monkeypatch.setattr(cli, "function_of", lambda name: lambda argv: None)
    with pytest.raises(TypeError, match="the command 'fit' has no parser that hands itself over"):
        cli.parser_of("fit")
    assert cli.HandsOver.is_wanted is False
