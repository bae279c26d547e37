"""The project as a package: names, versions, pins, who may import whom, and the scripts that set it up."""

import ast
import configparser
import importlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("pennylane_qattn", "lightning_modules")

#: Distributions whose import name is another.
IMPORT_NAMES = {"pyyaml": "yaml", "scikit-learn": "sklearn"}


def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None)
    parser.read_string((ROOT / "setup.cfg").read_text(encoding="utf-8"))
    return parser


def requirements(section: str, key: str) -> list[Requirement]:
    lines = setup_cfg()[section][key].splitlines()
    return [Requirement(line) for line in lines if line.strip() and not line.strip().startswith("#")]


def pins() -> dict[str, Requirement]:
    lines = (ROOT / "scripts" / "constraints.txt").read_text(encoding="utf-8").splitlines()
    found = [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]
    return {canonicalize_name(pin.name): pin for pin in found}


def module_files() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> set[str]:
    """Full names of all modules that a file imports, anywhere in it; relative imports resolved."""
    package = path.relative_to(ROOT).parent.parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            origin = ".".join(part for part in (base, node.module) if part)
            # `from package import name` may name a module or something in one; keep both readings
            found.add(origin)
            found.update(f"{origin}.{alias.name}" for alias in node.names)
    return found


def top_names(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


def project_files() -> list[Path]:
    """The tracked files; without git, every file except what .gitignore keeps out."""
    if (ROOT / ".git").exists() and shutil.which("git"):
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        # the folder may belong to another user, as in a container; reading the list is safe all the same
        safe = {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": "safe.directory", "GIT_CONFIG_VALUE_0": "*"}
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, env=os.environ | safe)
        if listed.returncode == 0:
            return [path for name in listed.stdout.decode().split("\0") if name and (path := ROOT / name).is_file()]
    made = re.compile(
        r"(^|/)(\.git|\.venv|runs|build|dist|docs/_build|docs/gallery|htmlcov|__pycache__|\.\w+_cache|\.hypothesis|[^/]+\.egg-info)/"
    )
    paths = [path for path in ROOT.rglob("*") if path.is_file()]
    return [path for path in paths if not made.search(path.relative_to(ROOT).as_posix())]


# -- versions and names --------------------------------------------------------------------------------------


def test_one_version_everywhere():
    version = setup_cfg()["metadata"]["version"]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"] == version
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert headings[0] == version
    for package in map(importlib.import_module, PACKAGES):
        assert getattr(package, "__version__", version) == version
    try:
        installed = importlib.metadata.version("pennylane-qattn")
    except importlib.metadata.PackageNotFoundError:
        return  # run from the sources, without an installation
    assert installed == version


def test_the_console_command_can_be_called():
    (line,) = setup_cfg()["options.entry_points"]["console_scripts"].split("\n")[1:]
    command, target = (part.strip() for part in line.split("="))
    module, function = target.split(":")
    assert command == "qattn"
    assert callable(getattr(importlib.import_module(module), function))


@pytest.mark.parametrize("name", [module_name(p) for p in module_files() if p.stem != "__main__"])
def test_every_module_can_be_imported(name):
    importlib.import_module(name)


def test_every_folder_with_code_is_a_package():
    """Otherwise setuptools leaves it out of the wheel."""
    assert [path for path in module_files() if not (path.parent / "__init__.py").exists()] == []


def test_package_data_exist():
    for package, patterns in setup_cfg()["options.package_data"].items():
        for pattern in patterns.split(","):
            assert list((ROOT / package).glob(pattern.strip())), f"setup.cfg: nothing matches {package}/{pattern}"


def test_pyproject_holds_only_the_build_system_and_tool_settings():
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert set(pyproject) == {"build-system", "tool"}


def test_the_licence_is_apache_2():
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License\n                           Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert setup_cfg()["metadata"]["license"] == "Apache-2.0"


def test_the_citation_names_both_papers():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= set(citation)
    papers = [work for work in citation["references"] if work["type"] == "article"]
    cited = {identifier["value"] for paper in papers for identifier in paper["identifiers"]}
    assert {"arXiv:2603.03318", "arXiv:2307.08045"} <= cited
    assert all(work["authors"] and work["title"] for work in citation["references"])
    (code,) = [work for work in citation["references"] if work["type"] == "software"]
    link = f"{code['repository-code']}/blob/{code['commit']}/"
    assert link in (ROOT / "docs" / "reproduction.md").read_text(encoding="utf-8")


# -- dependencies --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "section, key",
    [
        ("options", "install_requires"),
        *(("options.extras_require", extra) for extra in ("test", "hf", "docs", "release")),
    ],
)
def test_every_requirement_is_pinned_within_its_range(section, key):
    pinned = pins()
    wanted = requirements(section, key)
    assert wanted
    for requirement in wanted:
        name = canonicalize_name(requirement.name)
        assert name in pinned, f"scripts/constraints.txt does not pin {name}"
        (specifier,) = pinned[name].specifier
        assert specifier.operator == "=="
        assert requirement.specifier.contains(specifier.version, prereleases=True), f"{requirement}: {specifier}"


def test_what_the_pinned_packages_need_is_pinned_too():
    """Follows the metadata of what is installed, so a package added to setup.cfg cannot come in unpinned."""
    pinned = pins()
    names = ["test", "hf"] + [
        extra for extra, module in (("docs", "sphinx"), ("release", "twine")) if importlib.util.find_spec(module)
    ]
    extras = [requirements("options.extras_require", extra) for extra in names]
    waiting = [(r, "setup.cfg") for r in sum(extras, requirements("options", "install_requires"))]
    seen = set()
    while waiting:
        requirement, wanted_by = waiting.pop()
        name = canonicalize_name(requirement.name)
        if (name, *sorted(requirement.extras)) in seen:
            continue
        if name == "triton" or name.startswith(("nvidia-", "cuda-")):
            continue  # of torch's CUDA builds, each of which names one version
        seen.add((name, *sorted(requirement.extras)))
        assert name in pinned, f"scripts/constraints.txt does not pin {name}, which {wanted_by} needs"
        for line in importlib.metadata.requires(name) or []:
            needed = Requirement(line)
            if needed.marker is None or any(needed.marker.evaluate({"extra": e}) for e in ("", *requirement.extras)):
                waiting.append((needed, name))


def test_constraints_hold_pins_and_nothing_else():
    for pin in pins().values():
        assert pin.url is None
        (specifier,) = pin.specifier
        assert specifier.operator == "=="
        assert "+" not in specifier.version, f"{pin}: a local version cannot be had from everywhere"


def test_every_import_is_declared():
    declared = requirements("options", "install_requires")
    declared += [r for extra in ("fast", "hf", "index") for r in requirements("options.extras_require", extra)]
    names = {canonicalize_name(requirement.name) for requirement in declared}
    known = {IMPORT_NAMES.get(name, name.replace("-", "_")) for name in names}
    known |= sys.stdlib_module_names | set(PACKAGES) | {"triton"}  # which comes with torch's builds for CUDA
    for path in module_files():
        missing = top_names(imports(path)) - known
        assert not missing, f"{path.relative_to(ROOT)} imports {', '.join(sorted(missing))}; add it to setup.cfg"


# -- who may import whom -------------------------------------------------------------------------------------


def test_pennylane_qattn_knows_nothing_of_lightning():
    for path in sorted((ROOT / "pennylane_qattn").rglob("*.py")):
        forbidden = top_names(imports(path)) & {
            "lightning",
            "pytorch_lightning",
            "lightning_modules",
            "torchmetrics",
        }
        assert not forbidden, f"{path.relative_to(ROOT)} imports {', '.join(sorted(forbidden))}"


def test_gpt_knows_neither_pennylane_nor_lightning():
    """Nor does anything that gpt.py imports from its own package."""
    waiting, seen = [ROOT / "lightning_modules" / "gpt.py"], set()
    while waiting:
        path = waiting.pop()
        seen.add(path)
        names = imports(path)
        foreign = top_names(names) - sys.stdlib_module_names - {"torch", "jaxtyping", "lightning_modules"}
        assert not foreign, f"{path.relative_to(ROOT)} imports {', '.join(sorted(foreign))}"
        for name in names:
            imported = ROOT / Path(*name.split(".")).with_suffix(".py")
            if name.startswith("lightning_modules.") and imported.exists() and imported not in seen:
                waiting.append(imported)


# -- what is committed ---------------------------------------------------------------------------------------

#: Spelled in two parts, so that this file does not hold them.
INDEX_HOSTS = ("pypi." + "org", "pythonhosted." + "org", "download.pytorch." + "org", "pypi" + "/simple")
#: Folders of one machine: this one's, and those that stand for a machine wherever they are named.
MACHINE_FOLDERS = {str(ROOT), str(Path.home()), "/" + "root", "/" + "work", "/" + "tmp"} - {"/"}
MACHINE_PATH = re.compile(rf"(?<![\w.~$}}*/-])(?:{'|'.join(map(re.escape, MACHINE_FOLDERS))})/[\w.]")


@pytest.mark.parametrize("text", ["cd /" + "root/x", '"/' + 'work/a"', "(/" + "tmp/a)", f"{ROOT}/a"])
def test_a_machine_path_is_recognised(text):
    assert MACHINE_PATH.search(text)


@pytest.mark.parametrize(
    "text", [*(f"{start}/" + "work/x" for start in ("https://a.org", "docs", "~", "$PWD")), "#!/usr/bin/env bash"]
)
def test_other_slashes_are_no_machine_path(text):
    assert not MACHINE_PATH.search(text)


def test_no_file_names_a_machine_path_or_a_package_index():
    files = project_files()
    assert {ROOT / "setup.cfg", ROOT / "scripts" / "test.sh", Path(__file__).resolve()} <= set(files)
    for path in files:
        text = path.read_bytes().decode("utf-8", errors="ignore")
        found = [host for host in INDEX_HOSTS if host in text]
        found += [match.group() for match in MACHINE_PATH.finditer(text)]
        assert not found, f"{path.relative_to(ROOT)} names {found[0]}"


def test_the_top_level_stays_as_it_is():
    known = {
        "setup.cfg",
        "pyproject.toml",
        *PACKAGES,
        "scripts",
        "configs",
        "tests",
        "docs",
        ".ci",
        ".gitignore",
    }
    known |= {
        "LICENSE",
        "CITATION.cff",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "README.md",
        "MANIFEST.in",
        ".gitattributes",
    }
    assert {path.relative_to(ROOT).parts[0] for path in project_files()} <= known


# -- the scripts ---------------------------------------------------------------------------------------------


SCRIPTS = [".ci/run", *(f"scripts/{name}.sh" for name in ("docs", "environment", "quickstart", "release", "test"))]


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_are_executable_and_parse(name):
    assert os.access(ROOT / name, os.X_OK)
    subprocess.run(["bash", "-n", ROOT / name], check=True)


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_pages_name_only_files_that_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert "bash scripts/test.sh" in text
    named = re.findall(rf"(?:\b(?:{'|'.join(PACKAGES)}|scripts|configs|tests|docs)/[\w./-]*\w)", text)
    named += re.findall(r"\]\((?!https?:|#)([^)#]+)", text)
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_python_examples_of_the_readme_run():
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    names: dict = {}
    for example in examples:
        exec(compile(example, "README.md", "exec"), names)
    assert names["plan"].explain() in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_readme_lists_every_mechanism():
    from pennylane_qattn import ATTENTION

    named = re.findall(r"^\| `([\w-]+)` \|", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(named) == sorted(ATTENTION)


def environment(folder: Path, **variables: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", str(ROOT / "scripts" / "environment.sh")],
        env={"PATH": os.environ["PATH"], "QATTN_VENV": str(folder), **variables},
        capture_output=True,
        text=True,
        timeout=60,
    )


def fake_pythons(folder: Path, version: str) -> str:
    """A PATH on which every Python has this version; nothing else about them works."""
    folder.mkdir()
    for name in ("python", "python3", "python3.11", "python3.12", "python3.13", "python3.14"):
        fake = folder / name
        major, minor = version.split(".")
        # answers the one question that environment.sh asks first: `sys.exit(sys.version_info < (3, 11))`
        fake.write_text(f"#!/bin/sh\n[ {major} -gt 3 ] || [ {major} -eq 3 -a {minor} -ge 11 ]\n")
        fake.chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


def assert_one_line_error(run: subprocess.CompletedProcess, *words: str) -> None:
    assert run.returncode == 1
    (line,) = run.stderr.splitlines()
    assert line.startswith("error: ")
    assert all(word in line for word in words)


def test_an_old_python_is_refused_in_one_line(tmp_path):
    run = environment(tmp_path / "venv", PATH=fake_pythons(tmp_path / "bin", "3.10"))
    assert_one_line_error(run, "Python 3.11", "QATTN_PYTHON")
    assert not (tmp_path / "venv").exists()


def test_a_wrong_choice_of_python_is_refused_in_one_line(tmp_path):
    assert_one_line_error(environment(tmp_path / "venv", QATTN_PYTHON=str(tmp_path)), "QATTN_PYTHON", str(tmp_path))


def test_missing_constraints_are_refused_in_one_line(tmp_path):
    run = environment(tmp_path / "venv", QATTN_CONSTRAINTS=str(tmp_path / "none.txt"))
    assert_one_line_error(run, "QATTN_CONSTRAINTS", str(tmp_path / "none.txt"))
    assert not (tmp_path / "venv").exists()


def test_a_folder_made_by_others_is_refused_and_kept(tmp_path):
    folder = tmp_path / "with a space"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    assert_one_line_error(environment(folder), "with a space", "QATTN_VENV")
    assert [path.name for path in folder.iterdir()] == ["thesis.txt"]


def test_a_finished_environment_is_reused_and_a_half_made_one_is_not(tmp_path):
    """With an interpreter that records its calls in place of a real one, so that nothing is installed."""
    calls, folder = tmp_path / "calls", tmp_path / "venv"
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/sh\n"
        f'echo "$*" >> "{calls}"\n'
        'case "$*" in\n'
        f'"-m venv"*) mkdir -p "{folder}/bin" && cp "$0" "{folder}/bin/python" ;;\n'
        '"-m pip"*) [ ! -e "$FAIL_PIP" ] ;;\n'
        f'*) exec "{sys.executable}" "$@" ;;\n'
        "esac\n"
    )
    python.chmod(0o755)
    (tmp_path / "fail").touch()

    def installs(**variables: str) -> tuple[int, list[str]]:
        calls.write_text("")
        run = environment(folder, QATTN_PYTHON=str(python), **variables)
        return run.returncode, [line for line in calls.read_text().splitlines() if line.startswith("-m")]

    code, made = installs(FAIL_PIP=str(tmp_path / "fail"))
    assert (code, len(made)) == (1, 2)
    (folder / "left-over").touch()
    code, made = installs(FAIL_PIP="", QATTN_PIP_ARGS="--no-cache-dir --retries 9")
    assert (code, len(made)) == (0, 2)
    assert not (folder / "left-over").exists()
    pins = ROOT / "scripts" / "constraints.txt"
    assert f"--constraint {pins} --no-cache-dir --retries 9 --editable ." in made[1]
    assert installs(FAIL_PIP="") == (0, [])
    others = tmp_path / "oldest.txt"
    for versions in ("numpy==2.0.0", "numpy==2.1.0"):  # other versions, in the same file too, are installed anew
        others.write_text(versions)
        code, made = installs(FAIL_PIP="", QATTN_CONSTRAINTS=str(others))
        assert (code, len(made)) == (0, 1)
        assert f"--constraint {others} --editable ." in made[0]
        assert installs(FAIL_PIP="", QATTN_CONSTRAINTS=str(others)) == (0, [])
    assert f"--constraint {pins} --editable ." in installs(FAIL_PIP="")[1][0]
