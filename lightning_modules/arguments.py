"""How the commands that train read options and configs, and how mistakes in them read.

jsonargparse parses. Its messages go over many lines and name neither the config nor the option that was meant; here
they become one line that does.
"""

import argparse
import itertools
import os
import re
import textwrap
import typing
from collections.abc import Iterable
from typing import Any, Union

from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser

from lightning_modules import cli, trust


class Parser(cli.HandsOver, LightningArgumentParser):
    """A parser that takes no abbreviations, and names the config in which a mistake is."""

    def __init__(self, *args: Any, **kwargs: Any):
        # jsonargparse makes further parsers of this class, as for `--model.attention.help`, and gives them no name.
        super().__init__(*args, **{"prog": "qattn", "allow_abbrev": False, "exit_on_error": False, **kwargs})

    def parse_path(self, path: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Namespace:
        try:
            return super().parse_path(path, *args, **kwargs)
        except UnicodeDecodeError:
            raise ValueError(f"{str(path)!r} is not UTF-8; convert the file") from None
        except (argparse.ArgumentError, ValueError) as error:
            raise ValueError(f"{path}: {explain(self, str(error))}") from error

    def parse_string(self, *args: Any, **kwargs: Any) -> Namespace:
        config = super().parse_string(*args, **kwargs)
        for group in self.groups or ():
            if group in config and not isinstance(config[group], Namespace):
                raise ValueError(f"{group} must hold options, as in '{group}: {{name: value}}'; got {config[group]!r}")
        return config


def parse(parser: LightningArgumentParser, args: Iterable[str], **options: Any) -> Namespace:
    """`parser.parse_args`, whose mistakes are a ValueError of one line.

    What is not trusted is not imported, from now on; `--trust` among the arguments says what is.
    """
    args, trusted = trust.split(args)
    args = [re.sub("^--allow-noncausal(?==|$)", "--allow_noncausal", argument) for argument in args]
    trust.only(trusted)
    try:
        config = parser.parse_args(args, **options)
    except argparse.ArgumentError as error:
        raise ValueError(explain(parser, str(error))) from error
    except RecursionError:
        raise ValueError("the config nests its values too deep, or in themselves; write them flat") from None
    if config.get("trust"):
        raise ValueError(f"a config cannot give trust; take {config.trust!r} out of it, and use {trust.OPTION}")
    trust.check_functions(config)
    config.trust = trusted
    return config


def try_integers_first(parser: LightningArgumentParser) -> None:
    """Makes 1 an int and 1.0 a float wherever an option is either, as a number of batches or a share of them.

    jsonargparse tries the types in their order, which is not that of the source: `typing` keeps what `Optional` was
    given, takes `Union[float, int]` for `Union[int, float]`, and hands out whichever some library has asked for first.
    """
    for action in parser._actions:
        kinds = list(typing.get_args(getattr(action, "_typehint", None)))
        if int in kinds and float in kinds and kinds.index(float) < kinds.index(int):
            first, second = kinds.index(float), kinds.index(int)
            kinds[first], kinds[second] = int, float
            setattr(action, "_typehint", Union[tuple(kinds)])  # noqa: B010, UP007


def instantiate(parser: LightningArgumentParser, config: Namespace) -> Namespace:
    """`parser.instantiate`, with the reason alone where none of several types takes a value."""
    try:
        return parser.instantiate(config)
    except ValueError as error:
        raise ValueError(explain(parser, str(error))) from error


_UNKNOWN = re.compile(
    r"unrecognized arguments: -*([^\s=]+)|Group '(\S+)' does not accept option '(\S+)'|Option '(\S+)' is not accepted"
)


def explain(parser: LightningArgumentParser, text: str) -> str:
    """The gist of a message of jsonargparse, with a remedy."""
    if path := trust.denied(text):
        return trust.refusal(path)
    option, text = _gist(text)
    if text.startswith("Unexpected config:"):
        return "it holds no options; write them as in 'model: {preset: qisa-16}'"
    if text.endswith("is abstract"):  # an option of something that is itself not named
        return f"{option}: say first which one, as in --{option} NAME"
    known = [str(key) for key in parser.get_defaults(skip_validation=True).keys()]
    if unknown := _UNKNOWN.match(text):
        name = ".".join(filter(None, unknown.groups()))
        text = cli.unknown_option(name, known, parser.prog)
    elif (owner := re.match(r"(\w+) has no option", text)) and option in known:
        text += f"; see {parser.prog} --{option}.help {owner[1]}"
    return f"{option}: {text}" if option else text


def _gist(text: str) -> tuple[str, str]:
    """The innermost option that a message is about, and what is wrong with it."""
    text = textwrap.dedent(text).strip()
    if outer := re.match(r'Parser key "([\w.]+)":', text):
        option, text = _gist(text[outer.end() :].lstrip("\n"))
        return ".".join(filter(None, (outer[1], option))), text
    if outer := re.match(r"Problem with given class_path '(?:\w+\.)*(\w+)':", text):
        option, text = _gist(text[outer.end() :].lstrip("\n"))
        if not option and (unknown := _UNKNOWN.match(text)):
            text = f"{outer[1]} has no option {'.'.join(filter(None, unknown.groups()))!r}"
        return option, text
    _, _, why_none = text.partition("Errors:\n")  # of several types that an option may have
    if why_none:
        indent = re.match(" *", why_none)[0]
        lines = itertools.takewhile(lambda line: line.startswith(indent), why_none.split("\n"))
        reasons = re.split(rf"^{indent}- ", "\n".join(lines), flags=re.MULTILINE)[1:]
        given = re.search(r"Given value: (.*)\Z", text)
    else:
        reasons = [text]
        given = re.search(r"\. Got value: (.*)\Z", text)
    expected = re.compile(r"Expected an? (?!instantiatable)(.*?)(?:\. Got .*|: .*)?\s*\Z")
    types = [expected.match(reason) for reason in reasons]
    if None in types:
        reason = reasons[types.index(None)]
        return _gist(reason) if why_none else ("", _plain(reason))
    wanted = " or ".join(dict.fromkeys(_type_name(found[1]) for found in types))
    return "", f"expected {wanted}" + (f"; got {given[1]}" if given else "")


def _plain(text: str) -> str:
    text = re.sub(r'in "<unicode string>", ', "in ", text)  # how PyYAML calls a config
    text = re.sub(r"^File does not exist: (.*)$", r"there is no file \1; check the path", text.strip())
    text = re.sub(r"^Path is not a file: (.*)$", r"\1 is a folder; name a file in it", text)
    text = re.sub(r"^Unexpected import path format: (.*)$", r"'\1' is no import path; write it as in mine.Model", text)
    return " ".join(re.sub(r"^(Unable to load config .*)\n.*", r"\1", text, flags=re.DOTALL).split())


def _type_name(text: str) -> str:
    if choices := re.fullmatch(r"typing\.Literal\[(.*)\]", text):
        return f"one of {choices[1]}"
    text = re.sub(r"<class '([\w.]+)'>", r"\1", text)
    names = {"NoneType": "null", "str": "text", "dot import path string": "a class"}
    return names.get(text, text.removeprefix("collections.abc."))
