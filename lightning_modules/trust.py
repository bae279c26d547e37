"""Which code a config may name: that of the package and of Lightning, and what `--trust` names.

Importing a module runs it, so what a config names is looked at before it is imported: class paths and functions by
jsonargparse's list of import paths, functions of an ansatz here. The list holds for the whole process, from the first
config on. Only the command line gives trust: a config cannot, and a checkpoint names no code at all (`checkpoints.py`).
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any

from jsonargparse import Namespace, set_parsing_settings
from lightning.pytorch.cli import LightningArgumentParser

from pennylane_qattn.registry import Registry

#: What every config may name.
OWN = ("pennylane_qattn", "lightning_modules", "lightning.pytorch", "lightning.fabric")
OPTION = "--trust"

_trusted: list[str] = []


def add_option(parser: LightningArgumentParser) -> None:
    """Gives a parser `--trust`, which `parse` takes from the command line."""
    parser.add_argument(
        OPTION,
        metavar="PREFIX",
        type=Any,
        help="Import path, as mine or mine.models, of code that a config may name: importing it runs it. May be given "
        f"several times, on the command line only. Without it: {', '.join(OWN)}, and what is registered.",
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


def only(prefixes: Iterable[str]) -> None:
    """From now on, configs may name `OWN`, what is registered, and what lies under these prefixes."""
    before, _trusted[:] = list(_trusted), prefixes
    registered = [f"{cls.__module__}.{cls.__qualname__}" for kind in Registry.all.values() for cls in kind.values()]
    set_parsing_settings(
        import_path_denylist=["*", *before],
        import_path_allowlist=[*OWN, *(path for path in registered if "<" not in path), *_trusted],
        instantiate_subclass_spec_in_any=False,  # else an option of any type may build any class
    )


def refusal(path: str) -> str:
    """What is said of a path that is not trusted."""
    first = path.partition(".")[0]
    return f"{path!r} is code from elsewhere, and importing it would run it; if you trust it, add {OPTION} {first}"


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
