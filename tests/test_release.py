"""What scripts/check_release.py finds wrong with a release, and that what setuptools builds here passes."""

import importlib.metadata
import io
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CHECK = runpy.run_path(str(ROOT / "scripts" / "check_release.py"))
VERSION = CHECK["version"](ROOT)
METADATA = f"Name: pennylane-qattn\nVersion: {VERSION}\nLicense: Apache-2.0\nRequires-Python: >=3.11\n"


def release_error(words: str):
    return pytest.raises(CHECK["ReleaseError"], match=words)


@pytest.fixture
def sources(tmp_path) -> Path:
    folder = tmp_path / "sources"
    folder.mkdir()
    for name in CHECK["BESIDE"]:
        shutil.copy(ROOT / name, folder)
    for name in (*CHECK["PACKAGES"], "configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def wheel(folder: Path, sources: Path, metadata: str = METADATA, without: str = "", **more: str) -> Path:
    """A wheel with what belongs into one, changed as told."""
    path = folder / f"pennylane_qattn-{VERSION}-py3-none-any.whl"
    info = f"pennylane_qattn-{VERSION}.dist-info"
    own = {name: "" for name in ("WHEEL", "RECORD", "entry_points.txt", "top_level.txt")}
    own |= {"METADATA": metadata, "licenses/LICENSE": (sources / "LICENSE").read_text(encoding="utf-8")}
    held = {name: "" for name in CHECK["package_files"](sources)} | {f"{info}/{n}": text for n, text in own.items()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in (held | more).items():
            if name != without:
                archive.writestr(name, text)
    return path


def test_one_version_passes(sources):
    assert CHECK["version"](sources) == VERSION


@pytest.mark.parametrize("name, line", [("CITATION.cff", f"version: {VERSION}"), ("CHANGELOG.md", f"## {VERSION}")])
def test_another_version_is_found(sources, name, line):
    text = (sources / name).read_text(encoding="utf-8")
    (sources / name).write_text(text.replace(line, line.replace(VERSION, "9.9")), encoding="utf-8")
    with release_error(rf"^{name} has version 9.9 and setup.cfg has {VERSION}; make them one$"):
        CHECK["version"](sources)
    (sources / name).write_text("", encoding="utf-8")
    with release_error(rf"^{name} names no version"):
        CHECK["version"](sources)


def test_a_fault_is_one_line_and_a_status(sources):
    (sources / "CHANGELOG.md").write_text("## 9.9\n")
    command = [sys.executable, ROOT / "scripts" / "check_release.py", "version", sources]
    run = subprocess.run(command, capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (1, "")
    (line,) = run.stderr.splitlines()
    assert line.startswith("error: CHANGELOG.md")


def test_a_wheel_with_what_belongs_passes(tmp_path, sources):
    assert CHECK["check_wheel"](wheel(tmp_path, sources), sources) > 100


@pytest.mark.parametrize("name", ["pennylane_qattn/py.typed", "pennylane_qattn/grover/search.py"])
def test_what_a_wheel_lacks_is_found(tmp_path, sources, name):
    with release_error(f"lacks {name};"):
        CHECK["check_wheel"](wheel(tmp_path, sources, without=name), sources)


@pytest.mark.parametrize("name", ["tests/test_packaging.py", "runs/quickstart/row.json", "pennylane_qattn/gone.py"])
def test_what_a_wheel_should_not_hold_is_found(tmp_path, sources, name):
    with release_error(f"holds {name};"):
        CHECK["check_wheel"](wheel(tmp_path, sources, **{name: ""}), sources)


def test_other_metadata_are_found(tmp_path, sources):
    with release_error("says Requires-Python: >=3.8; setup.cfg says >=3.11"):
        CHECK["check_wheel"](wheel(tmp_path, sources, METADATA.replace("3.11", "3.8")), sources)


def test_another_licence_is_found(tmp_path, sources):
    path = wheel(tmp_path, sources)
    (sources / "LICENSE").write_text("another")
    with release_error("has another LICENSE"):
        CHECK["check_wheel"](path, sources)


def test_what_a_source_archive_lacks_is_found(tmp_path, sources):
    path = tmp_path / f"pennylane_qattn-{VERSION}.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        member = tarfile.TarInfo(f"pennylane_qattn-{VERSION}/PKG-INFO")
        member.size = len(METADATA)
        archive.addfile(member, io.BytesIO(METADATA.encode()))
    with release_error("lacks CHANGELOG.md, CITATION.cff, LICENSE and "):
        CHECK["check_source_archive"](path, sources)


def test_a_second_wheel_is_found(tmp_path, sources):
    (tmp_path / "old.tar.gz").touch()
    (tmp_path / "new.tar.gz").touch()
    with release_error("holds 2 files"):
        CHECK["archives"](sources, tmp_path)


def test_what_setuptools_builds_passes(tmp_path, sources, capsys):
    setuptools = pytest.importorskip("setuptools", reason="setuptools is of the extra release")
    if int(setuptools.__version__.split(".")[0]) < 77:
        pytest.skip("older setuptools put the licence elsewhere")
    (sources / "runs").mkdir()
    (sources / "runs" / "metrics.csv").touch()
    shutil.copytree(ROOT / "tests", sources / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "dist").mkdir()
    for kind in ("sdist", "wheel"):
        build = f"import sys, setuptools.build_meta as b; b.build_{kind}(sys.argv[1])"
        command = [sys.executable, "-c", build, tmp_path / "dist"]
        subprocess.run(command, cwd=sources, check=True, capture_output=True)
    CHECK["archives"](sources, tmp_path / "dist")
    assert len(capsys.readouterr().out.splitlines()) == 2


# --- what is installed ------------------------------------------------------------------------------------------

#: `installed`, in a folder that stands for an environment's, where some packages are not to be had.
INSTALLED = """
import importlib.machinery, importlib.metadata, runpy, sys, sysconfig
site, version, check, *hidden = sys.argv[1:]
find, read = importlib.machinery.PathFinder.find_spec, importlib.metadata.Distribution.from_name
def find_spec(name, *where):
    return None if name.partition(".")[0] in hidden else find(name, *where)
def from_name(name):
    if name in hidden:
        raise importlib.metadata.PackageNotFoundError(name)
    return read(name)
importlib.machinery.PathFinder.find_spec, importlib.metadata.Distribution.from_name = find_spec, from_name
sys.path.insert(0, site)
sysconfig.get_path = lambda name: site
runpy.run_path(check)["installed"](version)
"""
#: What the extras `hf`, `fast` and `index` bring.
OF_EXTRAS = ("transformers", "safetensors", "numba", "sklearn", "scikit-learn")


@pytest.mark.slow
def test_what_is_installed_without_extras_passes(tmp_path):
    for name in CHECK["PACKAGES"]:
        (tmp_path / name).symlink_to(ROOT / name)
    info = tmp_path / f"pennylane_qattn-{VERSION}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(METADATA + "Provides-Extra: hf\n")
    (tmp_path / "qattn").write_text(f"#!/bin/sh\necho qattn {VERSION}\n")
    (tmp_path / "qattn").chmod(0o755)
    command = [sys.executable, "-c", INSTALLED, tmp_path, VERSION, ROOT / "scripts" / "check_release.py", *OF_EXTRAS]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    *_, imports, extras = run.stdout.splitlines()
    assert imports.startswith("imports: ") and imports.endswith("without any extra")
    assert extras == "extras: asked for by name by lightning_modules.hugging_face, lightning_modules.pretrained"


@pytest.mark.parametrize(
    "error, passes",
    [
        (ImportError("needs transformers; install it with: pip install 'pennylane-qattn[hf]'"), True),
        (ImportError("needs it; install it with: pip install 'pennylane-qattn[none]'"), False),
        (ModuleNotFoundError("No module named 'transformers'"), False),
        (ValueError("install it with: pip install 'pennylane-qattn[hf]'"), False),
    ],
)
def test_only_an_error_that_names_an_extra_that_there_is_may_pass(monkeypatch, error, passes):
    metadata = Message()
    metadata["Provides-Extra"] = "hf"
    monkeypatch.setattr(importlib.metadata, "metadata", lambda name: metadata)
    assert CHECK["asks_for_extra"](error) is passes
