"""`qattn completion`: a script with which a shell completes commands, options and what they may be.

The script is made by shtab (https://docs.iterative.ai/shtab) from the parsers of all commands, once: nothing of Python
runs when the key is pressed.
"""

import argparse
import re
from typing import Any

import shtab

from lightning_modules.cli import COMMANDS, Parser, parser_of
from lightning_modules.option_names import names_of

SHELLS = ("bash", "zsh")
#: How options are called whose value is a file or a folder: in help, or by their own last part.
FILES = {"F", "FILE", "FOLDER", "DIR", "RUN", "PART", "config", "ckpt_path", "output", "data_dir", "default_root_dir"}


def completion(argv: list[str]) -> None:
    """`qattn completion`."""
    parser = Parser(
        prog="qattn completion",
        description="Prints a script that has a shell complete commands, options and names. For bash: write it to a "
        "file that ~/.bashrc sources. For zsh: write it to a file _qattn in a folder of $fpath.",
        epilog=f"example: {COMMANDS['completion'].example}",
        allow_abbrev=False,
    )
    parser.add_argument("shell", choices=SHELLS, help="which shell it is for")
    options = parser.parse_args(argv)
    print(shtab.complete(_all_commands(), options.shell))


def _all_commands() -> argparse.ArgumentParser:
    """`qattn` as one parser, with each command as a subparser, for shtab to read."""
    parser = argparse.ArgumentParser(prog="qattn", description="GPT-1 language models with quantum attention.")
    parser.add_argument("-V", "--version", action="store_true", help="print the version")
    commands = parser.add_subparsers()
    for name, command in COMMANDS.items():
        known = commands.add_parser(name, help=_text(command.help), add_help=False)
        for action in parser_of(name)._actions:
            _add(known, action)
    return parser


def _add(parser: argparse.ArgumentParser, action: argparse.Action) -> None:
    """Adds an option as plain argparse knows it; those that help does not list, and jsonargparse's links, are none."""
    if action.help == argparse.SUPPRESS or not all(name.startswith("-") for name in action.option_strings):
        return
    help = _text(action.help or "")
    if action.nargs == 0:
        parser.add_argument(*action.option_strings, dest=action.dest, action="store_true", help=help)
        return
    names = action.option_strings or [action.dest]
    where: dict[str, Any] = {"dest": action.dest} if action.option_strings else {}
    added = parser.add_argument(*names, **where, nargs=action.nargs, choices=_choices(action) or None, help=help)
    if not added.choices and FILES & {action.metavar, action.dest.rsplit(".", 1)[-1]}:
        vars(added)["complete"] = shtab.FILE


def _choices(action: argparse.Action) -> list[str]:
    """What the value of an option may be, as far as that is a list."""
    if action.choices is not None:
        return [str(choice) for choice in action.choices]
    listed = re.fullmatch(r"\{(.*)\}", str(action.metavar))  # as jsonargparse shows the choices of a type
    return listed[1].split(",") if listed else names_of(action.dest)


def _text(help: str) -> str:
    """The first sentence of a help text, which a script can hold."""
    return re.split(r"(?<=[.:;]) ", " ".join(help.split()), maxsplit=1)[0].rstrip(".:;").replace("%", "%%")
