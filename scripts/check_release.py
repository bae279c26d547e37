"""What scripts/release.sh asks of a release. Needs nothing but the standard library.

    python check_release.py version SOURCES             one version everywhere; prints it
    python check_release.py archives SOURCES FOLDER     both archives in a folder hold what they should
    python check_release.py installed VERSION           what is installed works, away from the sources

A line for each thing that was checked; a fault is one line on stderr, with exit status 1.
"""

import configparser
import importlib
import importlib.metadata
import pkgutil
import re
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

PACKAGES = ("pennylane_qattn", "lightning_modules")

#: What the source archive holds beside the packages. Tests are left out: without the repository they do not run.
BESIDE = ("CHANGELOG.md", "CITATION.cff", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.cfg")


class ReleaseError(Exception):
    """A fault of the release."""


# --- one version ------------------------------------------------------------------------------------------------


def setup_cfg(sources: Path) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None)
    parser.read_string((sources / "setup.cfg").read_text(encoding="utf-8"))
    return parser


def version(sources: Path) -> str:
    """The version in setup.cfg, which CITATION.cff and the first entry of CHANGELOG.md have to share."""
    wanted = setup_cfg(sources)["metadata"]["version"]
    for name, pattern in (("CITATION.cff", r"^version: *[\"']?([^\s\"']+)"), ("CHANGELOG.md", r"^## (\S+)")):
        found = re.search(pattern, (sources / name).read_text(encoding="utf-8"), re.MULTILINE)
        if not found:
            raise ReleaseError(f"{name} names no version; setup.cfg has {wanted}, so write that")
        if found[1] != wanted:
            raise ReleaseError(f"{name} has version {found[1]} and setup.cfg has {wanted}; make them one")
    return wanted


# --- the archives -----------------------------------------------------------------------------------------------


def package_files(sources: Path) -> set[str]:
    """What belongs into both archives: every module, the mark that it has types, and the data that setup.cfg lists."""
    found = {path for package in PACKAGES for path in (sources / package).rglob("*.py")}
    found |= {sources / package / "py.typed" for package in PACKAGES}
    for package, patterns in setup_cfg(sources)["options.package_data"].items():
        found.update(path for pattern in patterns.split(",") for path in (sources / package).glob(pattern.strip()))
    return {path.relative_to(sources).as_posix() for path in found}


def compare(archive: str, names: set[str], wanted: set[str]) -> None:
    if missing := sorted(wanted - names):
        raise ReleaseError(f"{archive} lacks {some(missing)}; see [options] in setup.cfg, and MANIFEST.in")
    if surplus := sorted(names - wanted):
        raise ReleaseError(f"{archive} holds {some(surplus)}; keep that out in setup.cfg or MANIFEST.in")


def some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def check_metadata(archive: str, metadata: Message, sources: Path) -> None:
    given = setup_cfg(sources)
    wanted = {
        "Name": given["metadata"]["name"],
        "Version": given["metadata"]["version"],
        "License": given["metadata"]["license"],
        "Requires-Python": given["options"]["python_requires"],
    }
    for field, value in wanted.items():
        if metadata[field] != value:
            raise ReleaseError(f"{archive} says {field}: {metadata[field]}; setup.cfg says {value}, so build it anew")


def check_wheel(path: Path, sources: Path) -> int:
    """Holds a wheel against the sources; returns the number of its files."""
    wanted = package_files(sources)
    with zipfile.ZipFile(path) as wheel:
        info = f"{'-'.join(path.name.split('-')[:2])}.dist-info"
        own = ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "top_level.txt", "licenses/LICENSE")
        names = set(wheel.namelist())
        compare(path.name, names, wanted | {f"{info}/{name}" for name in own})
        check_metadata(path.name, Parser().parsestr(wheel.read(f"{info}/METADATA").decode()), sources)
        if wheel.read(f"{info}/licenses/LICENSE") != (sources / "LICENSE").read_bytes():
            raise ReleaseError(f"{path.name} has another LICENSE than the sources; build it anew")
    return len(names)


def check_source_archive(path: Path, sources: Path) -> int:
    """Holds a source archive against the sources; returns the number of its files."""
    wanted = package_files(sources) | set(BESIDE)
    wanted |= {found.relative_to(sources).as_posix() for found in (sources / "configs").glob("*.yaml")}
    with tarfile.open(path) as archive:
        root = path.name.removesuffix(".tar.gz")
        names = {member.name.removeprefix(f"{root}/") for member in archive if member.isfile()}
        made = {name for name in names if name == "PKG-INFO" or name.startswith("pennylane_qattn.egg-info/")}
        compare(path.name, names - made, wanted)
        text = archive.extractfile(f"{root}/PKG-INFO").read().decode()
        check_metadata(path.name, Parser().parsestr(text), sources)
    return len(names)


def archives(sources: Path, folder: Path) -> None:
    for pattern, kind, check in (("*.tar.gz", "source archive", check_source_archive), ("*.whl", "wheel", check_wheel)):
        found = list(folder.glob(pattern))
        if len(found) != 1:
            raise ReleaseError(f"{folder} holds {len(found)} files {pattern}; exactly one has to be there")
        number = check(found[0], sources)
        print(f"{kind}: {number} files, every module, py.typed, the licence, and nothing that does not belong")


# --- what is installed ------------------------------------------------------------------------------------------


def installed(wanted: str) -> None:
    """Everything public can be imported from the environment's own folder, and `qattn` runs."""
    found = importlib.metadata.version("pennylane-qattn")
    command = Path(sysconfig.get_path("scripts"), "qattn")
    said = subprocess.run([command, "--version"], capture_output=True, text=True).stdout.strip()
    if (found, said) != (wanted, f"qattn {wanted}"):
        raise ReleaseError(f"version {found} is installed, and qattn --version says {said!r}; {wanted} was built")
    print(f"command: {said}")
    home, public, modules, waiting = Path(sysconfig.get_path("purelib")), 0, 0, []
    for name in PACKAGES:
        package = importlib.import_module(name)
        if not Path(package.__file__).is_relative_to(home):
            raise ReleaseError(f"{name} comes from {package.__file__}, not from {home}; run this elsewhere, with -I")
        for public_name in package.__all__:
            try:
                getattr(package, public_name)
            except Exception as error:
                raise ReleaseError(f"{name}.{public_name} cannot be had: {one_line(error)}") from error
            public += 1
        for module in pkgutil.walk_packages(package.__path__, f"{name}."):
            if module.name.endswith(".__main__"):
                continue
            modules += 1
            try:
                importlib.import_module(module.name)
            except Exception as error:
                if not asks_for_extra(error):
                    raise ReleaseError(f"{module.name} cannot be imported: {one_line(error)}") from error
                waiting.append(module.name)
    print(f"imports: {public} public names, {modules} modules, without any extra")
    if waiting:
        print(f"extras: asked for by name by {', '.join(sorted(waiting))}")


def asks_for_extra(error: Exception) -> bool:
    """Whether an import failed for want of an extra, and says which: a module that is made for one may do so."""
    extras = importlib.metadata.metadata("pennylane-qattn").get_all("Provides-Extra") or []
    told = re.search(r"pip install 'pennylane-qattn\[([\w-]+)\]'", str(error))
    return isinstance(error, ImportError) and told is not None and told[1] in extras


def one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def main(action: str, *arguments: str) -> None:
    if action == "version":
        found = version(Path(*arguments))
        print(f"version: {found} in setup.cfg, CITATION.cff and CHANGELOG.md", file=sys.stderr)
        print(found)
    elif action == "archives":
        archives(*map(Path, arguments))
    elif action == "installed":
        installed(*arguments)
    else:
        raise ReleaseError(f"unknown action {action!r}; choose from version, archives, installed")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except ReleaseError as error:
        sys.exit(f"error: {error}")
