"""The pages: their Python runs and prints what they say, their commands and options exist, their YAML is understood."""

import doctest
import os
import re
import shlex
import subprocess
import sys
import types
from pathlib import Path

import jaxtyping
import pytest
import torch
import yaml

from lightning_modules import cli
from pennylane_qattn import ANSATZE, ATTENTION, Execution
from pennylane_qattn.registry import Registry

ROOT = Path(__file__).resolve().parent.parent
#: What Sphinx writes is no page of ours.
MADE = (ROOT / "docs" / "_build", ROOT / "docs" / "gallery")
#: The README's Python is run by test_packaging.
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in [*(ROOT / "docs").rglob("*.md"), ROOT / "CONTRIBUTING.md"]
    if not any(path.is_relative_to(folder) for folder in MADE)
)
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
#: What `qattn` reads out of a page's YAML.
INNER = {"attention": ATTENTION, "ansatz": ANSATZE}


def blocks(page: str, *languages: str) -> list[tuple[int, str]]:
    """The fenced blocks of these languages, with the number of the line before each."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [(text[: m.start()].count("\n") + 1, m[2]) for m in found if m[1] in languages]


def commands(page: str) -> list[str]:
    shell = "".join(block for _, block in blocks(page, "bash")).replace("\\\n", " ")
    lines = [re.sub("^torchrun .* (?=qattn )", "", line) for line in shell.splitlines()]
    return [line for line in lines if line.startswith("qattn ")]


def run(code: str, line: int, names: dict, page: str) -> None:
    """Runs a block: the examples in it, or the whole."""
    if ">>> " not in code:
        # lines are numbered as on the page
        exec(compile("\n" * line + code, str(ROOT / page), "exec"), names)
        return
    test = doctest.DocTestParser().get_doctest(code, names, page, str(ROOT / page), line)
    said: list[str] = []
    runner = doctest.DocTestRunner(optionflags=FLAGS, verbose=False)
    runner.run(test, out=said.append, clear_globs=False)
    assert not runner.failures, "".join(said)
    names.update(test.globs)


@pytest.fixture
def module():
    """A module for a page's names, so that what it defines can be pickled; registries are left as they were.

    Shapes are not checked against signatures meanwhile: a reader meets the package's own messages.
    """
    jaxtyping.config.update("jaxtyping_disable", True)
    kept = {kind: dict(registry) for kind, registry in Registry.all.items()}
    name = "a_page_of_the_docs"
    sys.modules[name] = types.ModuleType(name)
    yield sys.modules[name]
    jaxtyping.config.update("jaxtyping_disable", False)
    del sys.modules[name]
    for kind, entries in kept.items():
        Registry.all[kind].clear()
        Registry.all[kind].update(entries)


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # Lightning's own code
@pytest.mark.parametrize("page", PAGES)
def test_the_python_runs_and_prints_what_the_page_says(page, module):
    torch.manual_seed(0)
    for line, code in blocks(page, "python"):
        run(code, line, vars(module), page)


def test_what_a_page_says_wrongly_is_found():
    with pytest.raises(AssertionError, match=r"Expected:\s+3\s+Got:\s+2"):
        run(">>> 1 + 1\n3\n", 7, {}, "a page")
    with pytest.raises(ZeroDivisionError):
        run("1 / 0", 7, {}, "a page")


def test_pages_have_what_these_tests_look_for():
    own = "docs/your_own_ansatz.md"
    assert len(blocks(own, "python")) >= 6 and len(blocks(own, "yaml")) == 1
    assert any(">>> " in code for _, code in blocks(own, "python"))
    assert len(commands("docs/devices.md")) >= 8
    five = next(code for _, code in blocks(own, "python") if "assert_gradients_agree(" in code)
    assert len([line for line in five.splitlines() if line]) <= 5


@pytest.fixture(scope="session")
def known_options():
    """The options that a command's help lists."""
    known: dict[str, set[str]] = {}

    def options(command: str, capsys) -> set[str]:
        if command not in known:
            capsys.readouterr()
            assert cli.main([command, "--help"]) == 0
            known[command] = set(re.findall(r"--[\w.]+", capsys.readouterr().out))
        return known[command]

    return options


@pytest.mark.parametrize("page", [*PAGES, "README.md"])
def test_commands_and_their_options_exist(page, known_options, capsys):
    for line in commands(page):
        _, command, *arguments = shlex.split(line, comments=True)
        if command.startswith("-"):
            continue
        assert command in cli.COMMANDS, line
        for option in (argument.partition("=")[0] for argument in arguments if argument.startswith("--")):
            assert option in known_options(command, capsys), f"{page}: qattn {command} has no {option}"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_commands_to_begin_with_run(tmp_path):
    """Those of docs/start.md, in their order, in an empty folder."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    lines = commands("docs/start.md")
    assert len(lines) >= 5
    for line in lines:
        command = [sys.executable, "-m", "lightning_modules", *shlex.split(line)[1:]]
        run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert run.returncode == 0, f"{line}\n{run.stderr}"
    assert (tmp_path / "runs" / "first").is_dir()


@pytest.mark.parametrize("page", PAGES)
def test_yaml_is_understood(page, known_options, capsys):
    for _, code in blocks(page, "yaml"):
        content = yaml.safe_load(code)
        if "mechanisms" in content:  # of qattn compare
            assert {f"--{name}" for name in content} <= known_options("compare", capsys)
            for mechanism in content["mechanisms"].values():
                check_class(mechanism, ATTENTION) if isinstance(mechanism, dict) else ATTENTION.lookup(mechanism)
            continue
        model = content["model"]
        assert set(model) <= {"execution", "attention"}
        if "execution" in model:
            Execution.from_plain(model["execution"])
        if "attention" in model:
            check_class(model["attention"], ATTENTION)


def check_class(value: dict, registry: Registry) -> None:
    """A class of the registry, with options that it has; a class within it likewise."""
    (cls,) = [cls for cls in registry.values() if value["class_path"] == f"pennylane_qattn.{cls.__name__}"]
    for name, option in value["init_args"].items():
        assert name in cls.__dataclass_fields__
        if isinstance(option, dict):
            check_class(option, INNER[name])


@pytest.mark.parametrize("page", PAGES)
def test_files_that_pages_name_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    named = re.findall(
        r"(?<![\w/])(?:(?:pennylane_qattn|lightning_modules|scripts|configs|tests|docs)/[\w./-]*\w)", text
    )
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", text)
    assert [name for name in named if not (ROOT / name).exists()] == []
    assert [link for link in links if not (ROOT / page).parent.joinpath(link).exists()] == []
