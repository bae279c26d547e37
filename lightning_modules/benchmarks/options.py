"""What benchmarks share at the command line: options, and mechanisms with options of their own."""

import argparse
from dataclasses import dataclass

import torch
import yaml

from lightning_modules.benchmarks.machine import DEVICES
from lightning_modules.labels import LEAKS, with_label
from pennylane_qattn import ATTENTION, Mechanism

#: What the others are compared with.
BASELINE = "classical"


@dataclass(frozen=True)
class Variant:
    """A mechanism, as it was asked for: `qisa`, or with options `qisa:split=true,values=linear`."""

    label: str
    mechanism: Mechanism

    @property
    def title(self) -> str:
        """What its rows are called; what sees the future says so."""
        return with_label(self.label, LEAKS if self.mechanism.is_published else "")


def add_common(parser: argparse.ArgumentParser, rounds: int) -> None:
    """Adds the options that every benchmark has; `rounds` is how often things are timed by default."""
    add = parser.add_argument
    add("--rounds", type=positive, default=rounds, metavar="N", help="how often each is timed (default: %(default)s)")
    add("--threads", type=positive, metavar="N", default=1, help="torch's threads (default: %(default)s)")
    add("--device", choices=DEVICES, default="cpu", help="where it runs (default: %(default)s)")
    add("--output", default="runs/benchmark", metavar="DIR", help="where JSON and PNG go (default: %(default)s)")


def add_mechanisms(parser: argparse.ArgumentParser) -> None:
    """Adds the choice of mechanisms; `mechanisms_of` reads it."""
    add = parser.add_argument
    what = "names, or names with options, as qisa:split=true,bias=false (default: every mechanism)"
    add("--mechanisms", nargs="+", type=variant, metavar="NAME", help=what)
    add("--published", action="store_true", help="add the published forms, which see the future")


def mechanisms_of(options: argparse.Namespace) -> list[Variant]:
    """The mechanisms that are asked for, each once; by default all of the registry that are not published forms."""
    chosen = options.mechanisms
    if chosen is None:
        chosen = [variant(name) for name, cls in ATTENTION.items() if not cls.is_published]
    if options.published:
        chosen = [*chosen, *(variant(name) for name, cls in ATTENTION.items() if cls.is_published)]
    return list({each.label: each for each in chosen}.values())


def variant(text: str) -> Variant:
    """Reads `name` or `name:option=value,option=value`; values are read as YAML.

    Raises:
        argparse.ArgumentTypeError: if there is no such mechanism, or it has no such option or value.
    """
    name, _, rest = text.partition(":")
    options = {}
    for part in rest.split(",") if rest else ():
        key, equals, value = part.partition("=")
        if not (key and equals and value):
            raise argparse.ArgumentTypeError(f"options of a mechanism are written option=value; got {part!r}")
        try:
            options[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise argparse.ArgumentTypeError(f"{key} is not a value: {value!r}") from None
    try:
        return Variant(text, ATTENTION.build(name, **options))
    except (TypeError, ValueError) as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def positive(text: str) -> int:
    """An integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1; got {text}")
    return int(text)


def two_or_more(text: str) -> int:
    """A number of tokens of which one has a past."""
    number = positive(text)
    if number < 2:
        raise argparse.ArgumentTypeError("must be at least 2, for a token to have a past; got 1")
    return number


def positive_number(text: str) -> float:
    """A finite number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number above 0; got {text}")
    return number


def synchronize_of(device: str):
    """What waits for a device to have done its work; `None` where functions return when it is done."""
    return torch.cuda.synchronize if device == "cuda" else None


def name_on(name: str, device: str) -> str:
    """The name of a result; those of a GPU do not overwrite those of the CPU."""
    return name if device == "cpu" else f"{name}-{device}"


def spread_note(rounds: int) -> str:
    """What the numbers of a cell are."""
    return f"Median of {counted(rounds, 'round')}, lowest and highest in parentheses"


def counted(number: int, what: str) -> str:
    """`1 head`, `4 heads`."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"
