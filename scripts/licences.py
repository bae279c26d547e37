#!/usr/bin/env python
"""The licences of all that is installed with the package, as the page docs/licences.md.

    python scripts/licences.py > docs/licences.md

Follows the metadata of what is installed, from setup.cfg on. A licence that is unknown, or that would ask more of those
who pass the package on than Apache-2.0 does, ends it with one line and status 1.
"""

import configparser
import importlib.metadata
import sys
from email.message import Message
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent

#: What counts as a dependency at run time: the package itself, and the extras that its own code imports.
EXTRAS = ("hf", "fast", "index")

#: How metadata without an SPDX expression name licences: in the field License, or in classifiers. Which BSD licence
#: many of them do not say.
SPDX = {
    "Apache": "Apache-2.0",
    "Apache 2.0": "Apache-2.0",
    "Apache 2.0 License": "Apache-2.0",
    "Apache License": "Apache-2.0",
    "Apache License 2.0": "Apache-2.0",
    "Apache Software License": "Apache-2.0",
    "3-Clause BSD License": "BSD-3-Clause",
    "BSD 2-Clause License": "BSD-2-Clause",
    "BSD 3-Clause": "BSD-3-Clause",
    "BSD 3-Clause License": "BSD-3-Clause",
    "BSD License": "BSD",
    "ISC License": "ISC",
    "ISC License (ISCL)": "ISC",
    "MIT License": "MIT",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "Python Software Foundation License": "PSF-2.0",
    "The MIT License (MIT)": "MIT",
}

#: Permissive ones, and MPL-2.0, whose terms end at the files that carry it: nothing here changes or contains those.
ACCEPTED = {
    "0BSD",
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "BSD",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BSL-1.0",
    "CC0-1.0",
    "CNRI-Python",
    "ISC",
    "MIT",
    "MIT-CMU",
    "MPL-2.0",
    "PSF-2.0",
    "Zlib",
}


class LicenceError(Exception):
    """A licence that cannot be accepted, or found out."""


def licence(metadata: Message) -> str:
    """The licence that a distribution's metadata name, as an SPDX expression where that can be told."""
    if expression := metadata.get("License-Expression"):
        return expression
    field = (metadata.get("License") or "").strip()
    field = SPDX.get(field, field)
    if all(part in ACCEPTED for part in field.split(" AND ")):
        return field
    named = [line.split(" :: ")[-1] for line in metadata.get_all("Classifier") or [] if line.startswith("License")]
    # where there are several, whether one or all of them hold is not said: all
    return " AND ".join(sorted({SPDX.get(name, name) for name in named})) or "unknown"


def is_accepted(expression: str) -> bool:
    """Whether every part of an expression is accepted, or offers something that is."""
    parts = [part.strip(" ()").split(" OR ") for part in expression.split(" AND ")]
    return all(any(choice.strip(" ()") in ACCEPTED for choice in choices) for choices in parts)


def requirements(section: str, key: str) -> list[Requirement]:
    parser = configparser.ConfigParser(interpolation=None)
    parser.read_string((ROOT / "setup.cfg").read_text(encoding="utf-8"))
    lines = parser[section][key].splitlines()
    return [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]


def needed(waiting: list[Requirement]) -> set[str]:
    """The names of all distributions that these bring, themselves included."""
    seen: set[tuple[str, ...]] = set()
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        key = (name, *sorted(requirement.extras))
        # of torch's CUDA builds; the page has a sentence on them
        if key in seen or name == "triton" or name.startswith(("nvidia-", "cuda-")):
            continue
        seen.add(key)
        try:
            lines = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            extras = ",".join(("test", *EXTRAS))
            raise LicenceError(f"{name} is not installed; bash scripts/environment.sh {extras} installs it") from None
        for other in map(Requirement, lines):
            if other.marker is None or any(other.marker.evaluate({"extra": e}) for e in ("", *requirement.extras)):
                waiting.append(other)
    return {name for name, *_ in seen}


def table() -> list[tuple[str, str, str]]:
    """Name, licence, and who needs it, of every distribution."""
    groups = {"the package": needed(requirements("options", "install_requires"))}
    groups |= {f"`{extra}`": needed(requirements("options.extras_require", extra)) for extra in EXTRAS}
    rows = []
    for name in sorted(set().union(*groups.values())):
        found = licence(importlib.metadata.metadata(name))
        # what the package needs is there whatever the extras
        by = [group for group, names in groups.items() if name in names]
        rows.append((name, found, by[0] if by[0] == "the package" else ", ".join(by)))
    return rows


def check(rows: list[tuple[str, str, str]]) -> None:
    for name, found, by in rows:
        if not is_accepted(found):
            raise LicenceError(f"{name}, which {by} needs, has licence {found!r}; do without it, or see ACCEPTED")


def page(rows: list[tuple[str, str, str]]) -> str:
    lines = "\n".join(f"| {name} | {found} | {by} |" for name, found, by in rows)
    return f"""\
# Licences

The package is licensed under Apache-2.0. These are the packages that are installed with it, and with the extras that
its code imports, in the tested set of versions on Linux; the licences are those that their metadata name, as SPDX
expressions where they can be told. `BSD` is one whose metadata do not say which. Written by
`python scripts/licences.py`; a test compares it with what is installed, and refuses a licence that is unknown or asks
more of those who pass the package on.

torch's builds with CUDA bring libraries of NVIDIA, which have terms of their own, and Triton (MIT). Builds for the CPU
do not.

| package | licence | needed by |
|---|---|---|
{lines}
"""


def main() -> None:
    rows = table()
    check(rows)
    sys.stdout.write(page(rows))


if __name__ == "__main__":
    try:
        main()
    except LicenceError as error:
        sys.exit(f"error: {error}")
