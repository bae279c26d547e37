"""Which code a config may name: that of the package and of Lightning, and what `--trust` names.

Importing a module runs it, so what a config names is looked at before it is imported: class paths and functions by
jsonargparse's list of import paths, functions of an ansatz here. The list holds for the whole process, from the first
config on. Only the command line gives trust: a config cannot, and a checkpoint names no code at all (`checkpoints.py`).

What is trusted is imported at once, so that the names which it registers are known to whatever reads a config or a
checkpoint.
"""

import importlib
import os
import re
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from jsonargparse import Namespace, set_parsing_settings
from lightning.pytorch.cli import LightningArgumentParser

from pennylane_qattn.registry import Registry

#: What every config may name.
OWN = ("pennylane_qattn", "lightning_modules", "lightning.pytorch", "lightning.fabric")
OPTION = "--trust"

_trusted: list[str] = []
_allowed: set[str] = set()  # at any time in this process


def add_option(parser: LightningArgumentParser) -> None:
    """Gives a parser `--trust`, which `parse` takes from the command line."""
    parser.add_argument(
        OPTION,
        metavar="PREFIX",
        type=Any,
        help="Import path, as mine or mine.models, of code that is imported, which runs it: the names that it "
        "registers are known then, and a config may name what it holds. May be given several times, on the command "
        "line only. "
        f"Without it: {', '.join(OWN)}, and what is registered.",
    )


def split(args: Iterable[str]) -> tuple[list[str], list[str]]:
    """Arguments without `--trust`, and the prefixes that it gave.

    Raises:
        ValueError: if one is missing, or is no import path.
    """
    rest, prefixes, left = [], [], iter(args)
    for argument in left:
        name, is_given, value = argument.partition("=")
        if name != OPTION:
            rest.append(argument)
            continue
        prefix = value if is_given else next(left, "")
        if not all(part.isidentifier() for part in prefix.split(".")) or prefix.split(".")[0] == "jsonargparse":
            raise ValueError(f"{OPTION} takes an import path, as mine or mine.models; got {prefix!r}")
        prefixes.append(prefix)
    return rest, prefixes


def import_trusted(prefix: str) -> None:
    """Imports the module that a prefix names or lies in; modules in the current folder are found, after all others.

    Raises:
        ValueError: if there is none, or it cannot be imported.
    """
    here = os.getcwd()
    if here not in sys.path:
        sys.path.append(here)
    module, inner = _longest_module(prefix)
    found: Any = sys.modules[module]
    for name in inner:
        if not hasattr(found, name):
            raise ValueError(f"{OPTION} {prefix}: {module!r} has no {'.'.join(inner)!r}; check the name")
        found = getattr(found, name)


def _longest_module(prefix: str) -> tuple[str, list[str]]:
    """Imports as much of the path as is a module; its name, and the parts behind it."""
    parts = prefix.split(".")
    for end in range(len(parts), 0, -1):
        name = ".".join(parts[:end])
        try:
            importlib.import_module(name)
        except Exception as error:
            if isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}."):
                continue
            reason = f"{type(error).__name__}: {error} (QATTN_DEBUG=1 shows where)"
            raise ValueError(f"{OPTION} {prefix}: cannot import {name!r}: {reason}") from error
        return name, parts[end:]
    raise ValueError(
        f"{OPTION} {prefix}: there is no module {parts[0]!r}; start qattn in the folder that holds it, or put that on "
        "PYTHONPATH"
    )


def only(prefixes: Iterable[str]) -> None:
    """Imports these; from now on, configs may name `OWN`, what is registered, and what lies under these prefixes."""
    prefixes = list(prefixes)
    for prefix in prefixes:
        import_trusted(prefix)
    _trusted[:] = prefixes
    registered = [f"{cls.__module__}.{cls.__qualname__}" for kind in Registry.all.values() for cls in kind.values()]
    allowed = [*OWN, *(path for path in registered if "<" not in path), *_trusted]
    set_parsing_settings(  # which adds to what was set before
        import_path_denylist=["*", *_allowed.difference(allowed)],
        import_path_allowlist=allowed,
        instantiate_subclass_spec_in_any=False,  # else an option of any type may build any class
    )
    _allowed.update(allowed)


def refusal(path: str) -> str:
    """What is said of a path that is not trusted."""
    first = path.partition(".")[0]
    return f"{path!r} is code from elsewhere, and importing it would run it; if you trust it, add {OPTION} {first}"


def name_remedy(text: str) -> str:
    """A message about a name that no registry has, with the remedy where the name could be one of the user's own."""
    unknown = re.search(r"unknown (\w+) '([^']*)'; choose from ", text)
    if unknown is None or unknown[1] not in Registry.all:
        return text
    is_path = re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)+", unknown[2])
    if is_path and text.startswith(unknown[0]) and unknown[2].partition(".")[0] not in sys.modules:
        return refusal(unknown[2])
    return f"{text}; if a module of yours registers it, add {OPTION} MODULE"


def denied(text: str) -> str | None:
    """The path that jsonargparse did not import, if that is what its message says."""
    found = re.search(r"Importing '([\w.]+)' is not allowed", text)
    return found[1] if found else None


def check_functions(config: Any) -> None:
    """Refuses a config with a description that would import what its options name, unless that is trusted.

    Raises:
        ValueError: naming the path and the remedy.
    """
    for path in _paths(config):
        if not any(f"{path}.".startswith(f"{prefix}.") for prefix in _trusted):
            raise ValueError(refusal(path))


def _paths(value: Any) -> Iterator[str]:
    if isinstance(value, Namespace):
        value = vars(value)
    if isinstance(value, dict):
        if _imports(value.get("class_path")):
            options = value.get("init_args") or {}
            texts = vars(options).values() if isinstance(options, Namespace) else options.values()
            yield from (text.replace(":", ".") for text in texts if isinstance(text, str))
        for part in value.values():
            yield from _paths(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _paths(part)


def _imports(class_path: Any) -> bool:
    name = str(class_path).rpartition(".")[2]
    return any(cls.__name__ == name and not cls.is_plain for kind in Registry.all.values() for cls in kind.values())
