"""The command line of `scripts/benchmark.py`: its subcommands, what each leaves behind, and how errors read.

Exit status: 0; 1 if the work failed, as where two timed things did not compute the same kind of result; 2 for bad
input; 130 after Ctrl-C. An error is one line on stderr; with QATTN_DEBUG=1 in the environment its traceback comes
first.
"""

import argparse
import importlib
import os
import shlex
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from lightning_modules.benchmarks import page
from lightning_modules.benchmarks.figures import picture
from lightning_modules.benchmarks.machine import use_device
from lightning_modules.benchmarks.result import CheckFailed, Result
from lightning_modules.benchmarks.table import print_result
from lightning_modules.cli import BAD_INPUT, FAILURE, Parser, one_line
from lightning_modules.files import atomic_write

PROG = "benchmark.py"
#: Benchmarks by name, in the order of the page: the module that runs each, and what it measures. A module has
#: `add_options(parser)` and `run(options)`, which gives results one after the other.
BENCHMARKS = {
    "attention": ("attention", "every mechanism against classical attention: inference, training step, memory"),
    "generate": ("generation", "text token by token, with a cache and without one"),
    "scaling": ("scaling", "cost of a layer against width, length, heads and qubits, with exponents"),
    "peers": ("peers", "folded circuits against PennyLane's TorchLayer and against dense observables"),
    "devices": ("devices", "circuits on devices against PennyLane's TorchLayer"),
    "grover": ("grover", "amplification against softmax, and sparse products against dense ones"),
}
#: Options that say where files go and nothing of what is measured.
ABOUT_FILES = ("--output",)


def main(argv: Sequence[str] | None = None, description: str | None = None) -> int:
    """Runs `benchmark.py` with these arguments, by default those of the process, and returns its exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        options = _parser(description).parse_args(argv)
        options.command_line = command_line(argv)
        options.act(options)
        return 0
    except KeyboardInterrupt:
        print(f"{PROG}: error: stopped by Ctrl-C", file=sys.stderr)
        return 130
    except Exception as error:
        if os.environ.get("QATTN_DEBUG") == "1":
            traceback.print_exception(error)
        text = " ".join(str(error).split()) if isinstance(error, CheckFailed) else one_line(error)
        print(f"{PROG}: error: {text}", file=sys.stderr)
        return BAD_INPUT if isinstance(error, ValueError | OSError) else FAILURE


def command_line(argv: Sequence[str]) -> str:
    """The line that measures the same, wherever its files go."""
    return shlex.join(["python", f"scripts/{PROG}", *_without_files(argv)])


def _without_files(argv: Sequence[str]) -> Iterator[str]:
    skips = False
    for argument in argv:
        name, equals, _ = argument.partition("=")
        if not skips and name not in ABOUT_FILES:
            yield argument
        skips = not skips and name in ABOUT_FILES and not equals


def _parser(description: str | None) -> argparse.ArgumentParser:
    look = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = Parser(prog=PROG, description=description, **look)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (module, help) in BENCHMARKS.items():
        benchmark = importlib.import_module(f"lightning_modules.benchmarks.{module}")
        command = commands.add_parser(name, help=help, description=benchmark.__doc__, **look)
        benchmark.add_options(command)
        command.set_defaults(act=_measure, run=benchmark.run)
    command = commands.add_parser("page", help="make a page of what the others wrote", description=page.__doc__, **look)
    page.add_options(command)
    command.set_defaults(act=_write_page)
    return parser


def _write_page(options: argparse.Namespace) -> None:
    print(f"written: {page.write_page(options, list(BENCHMARKS))}")


def _measure(options: argparse.Namespace) -> None:
    """Runs a benchmark, prints what it found, and writes it."""
    use_device(options.device)
    torch.set_num_threads(options.threads)
    folder = Path(options.output)
    _check_writable(folder)
    for result in options.run(options):
        print_result(result)
        print(f"written: {write(result, folder)}")


def write(result: Result, folder: Path) -> Path:
    """Writes a result's JSON and its picture, if it has one, and returns the path of the JSON."""
    path = result.write(folder)
    drawn = path.with_suffix(".png")
    content = picture(result)
    if content is None:  # that of an earlier result would not belong to this one
        drawn.unlink(missing_ok=True)
        return path
    with atomic_write(drawn) as file:
        file.write(content)
    return path


def _check_writable(folder: Path) -> None:
    """Refuses a folder that nothing can be written to, before anything is measured for it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        reason = error.strerror.lower()
        raise ValueError(f"cannot write to {str(folder)!r}: {reason}; choose another one with --output") from None
