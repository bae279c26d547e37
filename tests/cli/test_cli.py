"""The command itself: its help, its errors, and what it imports."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_modules import cli

ROOT = Path(__file__).parents[2]


def python(code):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], [], ["nope"], ["generate", "--help"]])
def test_help_and_version_import_nothing_heavy(arguments):
    done = python(
        f"import sys; from lightning_modules.cli import main; main({arguments})\n"
        "print(sorted({'torch', 'lightning', 'pennylane', 'jsonargparse', 'numpy'} & sys.modules.keys()))"
    )
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_help_lists_every_command_with_an_example(capsys):
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    for name, command in cli.COMMANDS.items():
        assert f"  {name} " in text and command.help in text and f"  {command.example}\n" in text
        assert command.example.startswith(f"qattn {name} ")


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("qattn ")


def test_an_unknown_command(refused):
    assert refused("fti") == f"unknown command 'fti'; choose from {', '.join(cli.COMMANDS)}"


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help(name, capsys):
    assert cli.main([name, "--help"]) == 0
    assert f"qattn {name}" in capsys.readouterr().out


def test_run_as_a_module():
    done = python(
        "import runpy, sys; sys.argv[1:] = ['nope']; runpy.run_module('lightning_modules', run_name='__main__')"
    )
    assert done.returncode == 2 and done.stderr.startswith("qattn: error: unknown command")


def raising(error):
    def function(argv):
        raise error

    return function


class MisconfigurationException(Exception):
    pass


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ValueError("two\nlines"), 2, "two lines"),
        (FileNotFoundError(2, "No such file or directory", "a.txt"), 2, "a.txt: no such file or directory"),
        (PermissionError(13, "Permission denied", "a/b"), 2, "a/b: permission denied"),
        (OSError(28, "No space left on device"), 1, "no space left on device"),
        (FloatingPointError("the loss is nan at step 3"), 1, "the loss is nan at step 3"),
        (MisconfigurationException("no such thing"), 2, "no such thing"),
        (KeyError("x"), 1, "KeyError: 'x' (QATTN_DEBUG=1 shows where)"),
        (RuntimeError("out of\n  memory"), 1, "RuntimeError: out of memory (QATTN_DEBUG=1 shows where)"),
        (KeyboardInterrupt(), 130, "stopped by Ctrl-C"),
        (argparse.ArgumentError(None, "unrecognized arguments: --x"), 2, "unrecognized arguments: --x"),
    ],
)
def test_errors_are_one_line(monkeypatch, refused, error, status, line):
    monkeypatch.setattr(cli, "function_of", lambda name: raising(error))
    assert refused("fit", status=status) == line


def test_ctrl_c_as_lightning_ends(monkeypatch, refused):
    def function(argv):
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            sys.exit(1)

    monkeypatch.setattr(cli, "function_of", lambda name: function)
    assert refused("fit", status=130) == "stopped by Ctrl-C"


def test_debug_shows_the_traceback(monkeypatch, capsys):
    monkeypatch.setenv("QATTN_DEBUG", "1")
    monkeypatch.setattr(cli, "function_of", lambda name: raising(ValueError("wrong")))
    assert cli.main(["fit"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("Traceback") and error.endswith("qattn: error: wrong\n")


def test_a_closed_pipe_is_no_error():
    command = f"{sys.executable} -m lightning_modules --help | true; echo ${{PIPESTATUS[0]}}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    for _ in range(3):  # who is first is chance
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=environment, check=False)
        assert done.stdout.strip() in ("0", "141") and "Traceback" not in done.stderr


# Messages of jsonargparse 4.53, shortened.
@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            'Parser key "model.block_size":\n  Does not validate against any of the Union subtypes\n'
            "  Subtypes: [<class 'int'>, <class 'NoneType'>]\n  Errors:\n    - Expected a <class 'int'>\n"
            "    - Expected a <class 'NoneType'>\n  Given value type: <class 'str'>\n  Given value: x",
            "model.block_size: expected int or null; got x",
        ),
        (
            "Parser key \"model.schedule\":\n  Expected a typing.Literal['constant', 'cosine']. Got value: linear",
            "model.schedule: expected one of 'constant', 'cosine'; got linear",
        ),
        (
            'Parser key "model.attention":\n  Does not validate against any of the Union subtypes\n'
            "  Subtypes: [<class 'Mechanism'>, <class 'str'>]\n  Errors:\n"
            "    - Problem with given class_path 'pennylane_qattn.QISA':\n        Option 'foo' is not accepted\n"
            "    - Expected a <class 'str'>\n  Given value type: <class 'NestedArg'>\n  Given value: foo",
            "model.attention: Problem with given class_path 'pennylane_qattn.QISA': Option 'foo' is not accepted",
        ),
        ("Group 'model' does not accept option 'x'", "Group 'model' does not accept option 'x'"),
    ],
)
def test_gist_of_a_message_of_the_parser(text, line):
    assert cli.one_line(argparse.ArgumentError(None, text)) == line
