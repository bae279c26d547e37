"""The command itself: its help, its errors, and what it imports."""

import os
import re
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


def test_help_tells_the_story(capsys):
    grouped = [name for names in cli.GROUPS.values() for name in names]
    assert sorted(grouped) == sorted(cli.COMMANDS)  # each once
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    first = re.findall(r"^  qattn (\S+)", text.partition("first steps:")[2].partition("begin:")[0], re.MULTILINE)
    assert first == ["fit", "test", "generate", "report"]
    places = [text.index(part) for part in ("first steps:", *(f"\n{group}:\n" for group in cli.GROUPS), "examples:")]
    assert places == sorted(places)
    status = text.partition("Exit status:")[2].partition("\n")[0]
    assert [int(number) for number in re.findall(r"\d+", status)] == list(ENDS)
    assert "QATTN_DEBUG=1" in text
    for page in re.findall(r"docs/\w+\.md", text):
        assert (ROOT / page).is_file()


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
        (
            FileNotFoundError(2, "No such file or directory", "a.txt"),
            2,
            "a.txt: no such file or directory; check the path",
        ),
        (PermissionError(13, "Permission denied", "a/b"), 2, "a/b: permission denied; choose another place"),
        (OSError(28, "No space left on device", "a/b"), 1, "a/b: no space left on device; make room there"),
        (OSError(5, "Input/output error"), 1, "input/output error"),
        (
            UnicodeEncodeError("ascii", "naïf", 2, 3, "x"),
            2,
            "the output is ascii, which has no '\\xef'; set PYTHONIOENCODING=utf-8",
        ),
        (FloatingPointError("the loss is nan at step 3"), 1, "the loss is nan at step 3"),
        (MisconfigurationException("no such thing"), 2, "no such thing"),
        (KeyError("x"), 1, "KeyError: 'x' (QATTN_DEBUG=1 shows where)"),
        (RuntimeError("out of\n  memory"), 1, "RuntimeError: out of memory (QATTN_DEBUG=1 shows where)"),
        (KeyboardInterrupt(), 130, "stopped by Ctrl-C"),
    ],
)
def test_errors_are_one_line(monkeypatch, refused, error, status, line):
    monkeypatch.setattr(cli, "function_of", lambda name: raising(error))
    assert refused("fit", status=status) == line


#: How a command may end, by exit status: what it gives back, or raises.
ENDS = {
    0: "return None",
    1: "raise FloatingPointError('the loss is nan')",
    2: "raise ValueError('no such thing')",
    130: "raise KeyboardInterrupt",
    141: "raise BrokenPipeError",
    143: "raise Stopped(143)",
}


def test_the_page_lists_every_exit_status():
    page = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    assert [int(status) for status in re.findall(r"^\| (\d+) \|", page, re.MULTILINE)] == list(ENDS)


@pytest.mark.parametrize("status", ENDS)
def test_exit_status(status):
    """Of a process, as a shell sees it."""
    done = python(
        "import sys\n"
        "from lightning_modules import cli\n"
        "class Stopped(SystemExit):\n"
        "    message = 'stopped by SIGTERM'\n"
        "def command(argv):\n"
        f"    {ENDS[status]}\n"
        "cli.function_of = lambda name: command\n"
        "sys.exit(cli.main(['fit']))"
    )
    assert done.returncode == status and "Traceback" not in done.stderr
    assert done.stderr.startswith("qattn: error: ") == (status not in (0, 141))


@pytest.mark.parametrize(("attention", "status"), [("qisa", 0), ("qisa-published", 1)])
def test_a_check_that_fails_has_status_1(attention, status):
    assert cli.main(["certify", attention]) == status


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
