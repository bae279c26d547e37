"""The pages: their Python runs and prints what they say, their commands and options exist, their YAML is understood."""

import dataclasses
import doctest
import os
import re
import shlex
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import yaml

from lightning_modules import cli
from lightning_modules.benchmarks import command as benchmark
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
#: Options of mechanisms, which the help of `qattn fit` leaves to theirs.
OF_MECHANISMS = {f"--model.attention.{field.name}" for cls in ATTENTION.values() for field in dataclasses.fields(cls)}


def blocks(page: str, *languages: str) -> list[tuple[int, str]]:
    """The fenced blocks of these languages, with the number of the line before each."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [(text[: m.start()].count("\n") + 1, m[2]) for m in found if m[1] in languages]


def shell_lines(page: str) -> list[str]:
    """The lines of a page's blocks of bash, those that go on joined."""
    shell = "".join(block for _, block in blocks(page, "bash")).replace("\\\n", " ")
    return [line for line in shell.splitlines() if line and not line.startswith("#")]


def commands(page: str) -> list[str]:
    lines = [re.sub("^(torchrun|sbatch) .*?(?=qattn )", "", line).rstrip("'") for line in shell_lines(page)]
    return [line for line in lines if line.startswith("qattn ")]


def prose(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


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
def module(without_shape_checks):
    """A module for a page's names, so that what it defines can be pickled; registries are left as they were.

    Shapes are not checked against signatures meanwhile: a reader meets the package's own messages.
    """
    kept = {kind: dict(registry) for kind, registry in Registry.all.items()}
    name = "a_page_of_the_docs"
    sys.modules[name] = types.ModuleType(name)
    yield sys.modules[name]
    del sys.modules[name]
    for kind, entries in kept.items():
        Registry.all[kind].clear()
        Registry.all[kind].update(entries)


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # Lightning's own code
@pytest.mark.parametrize("page", PAGES)
def test_the_python_runs_and_prints_what_the_page_says(page, module, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
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
            known = known_options(command, capsys) | (OF_MECHANISMS if command == "fit" else set())
            assert option in known, f"{page}: qattn {command} has no {option}"


def wrong_script(line: str, page: str, capsys) -> str | None:
    """What is wrong with a line that calls a script: no such file, or an option that it does not have."""
    found = re.match(r"(?:[A-Z_]+=\S+ )*(python|bash|sbatch) (scripts/\S+)(.*)", line.partition(" > ")[0])
    if not found:
        return None
    program, path, rest = found.groups()
    script = ROOT / path
    if not script.is_file():
        return f"{page}: there is no {path}"
    arguments = shlex.split(rest, comments=True)
    if script.name == "benchmark.py":
        capsys.readouterr()
        with pytest.raises(SystemExit, match="^0$"):
            benchmark.main([arguments[0], "--help"])
        text = capsys.readouterr().out
    else:
        text = script.read_text(encoding="utf-8")
    options = [argument.partition("=")[0] for argument in arguments if argument.startswith("--")]
    unknown = [option for option in options if not re.search(rf"(?<![\w-]){option}(?![\w-])", text)]
    return f"{page}: {path} has no {unknown[0]}" if unknown else None


@pytest.mark.parametrize("page", [*PAGES, "README.md"])
def test_scripts_and_their_options_exist(page, capsys):
    wrong = [found for line in shell_lines(page) if (found := wrong_script(line, page, capsys))]
    assert wrong == []


def test_a_script_that_is_not_there_and_an_option_that_it_lacks_are_found(capsys):
    assert wrong_script("A=1 bash scripts/none.sh --slow", "a page", capsys) == "a page: there is no scripts/none.sh"
    assert wrong_script("bash scripts/test.sh --slo  # all", "a page", capsys).endswith("scripts/test.sh has no --slo")
    assert wrong_script("bash scripts/test.sh --slow", "a page", capsys) is None
    line = "python scripts/benchmark.py peers --no_such_option"
    assert wrong_script(line, "a page", capsys).endswith("has no --no_such_option")


@pytest.mark.parametrize("page", [*PAGES, "README.md"])
def test_commands_stand_in_fences(page):
    """Where these tests see them. What a command says may be indented, `qattn: error: ...`."""
    text = prose((ROOT / page).read_text(encoding="utf-8"))
    assert re.findall(r"^    (?:qattn|torchrun|sbatch|python|bash) .*", text, re.MULTILINE) == []


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_commands_to_begin_with_run(tmp_path):
    """Those of docs/start.md, in their order, in a folder without runs."""
    for name in ("configs", "README.md"):
        (tmp_path / name).symlink_to(ROOT / name)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    lines = commands("docs/start.md")
    assert len(lines) >= 5
    for line in lines:
        command = [sys.executable, "-m", "lightning_modules", *shlex.split(line)[1:]]
        run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert run.returncode == 0, f"{line}\n{run.stderr}"
    assert (tmp_path / "runs" / "first").is_dir()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", ["docs/your_own_attention.md", "docs/your_own_ansatz.md"])
def test_the_commands_with_code_of_ones_own_run(page, tmp_path):
    """With a `mine.py` of what the page defines."""
    defined = [code for _, code in blocks(page, "python") if re.search("^(class|def) ", code, re.MULTILINE)]
    mine = re.sub(r"^assert_.*", "", "\n".join(defined), flags=re.MULTILINE)
    (tmp_path / "mine.py").write_text(mine)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    lines = commands(page)
    assert len(lines) >= 2 and all("--trust mine" in line for line in lines)
    for line in lines:
        command = [sys.executable, "-m", "lightning_modules", *shlex.split(line)[1:]]
        run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert run.returncode == 0, f"{line}\n{run.stderr}"


WITH_A_TEST_OF_THEIR_OWN = (
    "docs/start.md",
    "docs/your_own_attention.md",
    "docs/your_own_ansatz.md",
    "docs/your_own_device.md",
)
#: Why a command of a page is not run here.
NOT_RUN = {
    "--trainer.strategy ddp": "several processes: tests/cli/test_distributed.py runs them",
    "gpt1-fsdp.yaml": "needs GPUs; test_distributed has the strategy",
    "$SLURM_ARRAY_TASK_ID": "SLURM says the number; test_study runs shards",
    "qattn merge": "joins the thirty parts of an array; test_study merges",
    "my_package": "stands for a module of the reader's",
    "hf:openai-community": "fetches a model from the Hub",
    "--pretrained gpt1-folder": "a folder of the reader's; test_begin_with_pretrained makes one",
    "devices --try": "minutes; test_devices_command tries the devices that are there",
    "devices --preset gpt1": "minutes, for a model of the size of GPT-1; the table of a checkpoint is printed",
    "qattn grover": "minutes; tests/cli/test_grover.py has it at a small size",
    "--model.execution.processes": "starts processes of its own; test_spreading has them",
}
#: What makes a command small, after its own options.
MODEL = "--model.num_layers 1 --data.batch_size 2 --data.eval_windows 4 --trainer.enable_progress_bar false"
SMALL = {
    "fit": f"{MODEL} --data.corpus pydoc --trainer.val_check_interval 1 --trainer.limit_val_batches 1",
    "test": "--data.eval_windows 4",
    "generate": "--max_new_tokens 4",
    "report": "--sample_length 4 --overwrite",
    "cross-check": "--windows 2 --steps 1 --batch 1",
    "noise-sweep": "--windows 1 --repetitions 2 --shots 10 --overwrite",
    "compare": "--print_config",  # reads the config; the quickstart's comparison is trained
}
QUICKSTART = (
    """--sample_length 4 --fit.trainer '{"max_steps": 2, "val_check_interval": 1}' """
    """--fit.data '{"corpus": "pydoc", "batch_size": 2, "eval_windows": 4}'"""
)


def reason_not_to_run(line: str) -> str | None:
    return next((reason for part, reason in NOT_RUN.items() if part in line), None)


def small(line: str) -> list[str]:
    """The arguments of a command, made small: a run of two steps, or of four where it goes on."""
    _, command, *arguments = shlex.split(line.partition(" > ")[0], comments=True)
    more = QUICKSTART if "configs/quickstart.yaml" in arguments else SMALL.get(command, "")
    if command == "fit":
        more += f" --trainer.max_steps {4 if '--ckpt_path' in arguments else 2}"
    return [command, *arguments, *shlex.split(more)]


@pytest.fixture
def beside_configs(monkeypatch, tmp_path, without_shape_checks):
    """An empty folder with the configs; what `qattn` sets for its process is undone. Shapes are as in `module`."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    before, deterministic = dict(os.environ), torch.are_deterministic_algorithms_enabled()
    yield tmp_path
    torch.use_deterministic_algorithms(deterministic)
    for name in os.environ.keys() - before.keys():
        del os.environ[name]


def run_small(lines: list[str], capsys) -> None:
    for line in lines:
        if reason_not_to_run(line):
            continue
        arguments = small(line)
        if arguments[0] == "export-hf":
            pytest.importorskip("transformers")
        capsys.readouterr()
        assert cli.main(arguments) == 0, f"{line}\n{capsys.readouterr().err}"


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.filterwarnings("ignore")  # of commands at sizes that nobody would choose
@pytest.mark.parametrize(
    "page", ["README.md", *(page for page in PAGES if page not in WITH_A_TEST_OF_THEIR_OWN and commands(page))]
)
def test_the_commands_of_a_page_run(page, beside_configs, capsys):
    """In their order, at a small size; a page other than the README takes the run that the README trains."""
    if page != "README.md":
        training = [line for line in commands("README.md") if line.startswith("qattn fit ") and "--run" not in line]
        run_small(training, capsys)
    run_small(commands(page), capsys)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore")  # as above
def test_the_commands_with_a_device_of_ones_own_run(module, beside_configs, capsys):
    """In the process that the page's Python has made the device for, on a run of its own."""
    page = "docs/your_own_device.md"
    *makes, (last_line, leaves) = blocks(page, "python")
    lines = commands(page)
    assert len(lines) >= 2 and not any(map(reason_not_to_run, lines))
    model = "--model.num_layers 1 --model.num_heads 2 --model.embed_dim 6 --model.block_size 5 --trainer.max_steps 1"
    data = "--data.corpus pydoc --data.batch_size 2 --data.eval_windows 4 --report false"
    for line, code in makes:
        run(code, line, vars(module), page)
    try:
        assert cli.main(["fit", "--run", "qisa-16", *model.split(), *data.split()]) == 0
        run_small(lines, capsys)
    finally:
        run(leaves, last_line, vars(module), page)
    said = capsys.readouterr().out
    assert "dense.qubit" in said and "rounding" in said  # of the last one


def test_what_is_not_run_is_still_on_a_page():
    lines = [line for page in ("README.md", *PAGES) for line in commands(page)]
    assert [part for part in NOT_RUN if not any(part in line for line in lines)] == []


# --- formulas ---------------------------------------------------------------------------------------------------


#: The pages of the mechanisms have a stricter test of their own; the others here are printed by a command.
WITH_FORMULAS = [page for page in PAGES if not page.startswith(("docs/grover/", "docs/mechanisms/"))]
WITH_FORMULAS.append("docs/mechanisms/index.md")
FORMULA = re.compile(
    r"^\$\$|\$\$$"  # on lines of its own
    r"|(?<![$`\\])\$[^$\n]*(?:=|\\le\b|\\approx|\\propto)[^$\n]*\$"  # a relation within a sentence
    r"|[√∂⟨∑].*",  # without LaTeX
    re.MULTILINE,
)


def formulas_without_code(text: str) -> list[str]:
    """Headings of sections with formulas after which no code compares anything, before the next such section."""
    first, *parts = re.split(r"^## (.+)$", text, flags=re.MULTILINE)
    waiting: list[str] = []
    wrong: list[str] = []
    for heading, section in [("", first), *zip(parts[::2], parts[1::2], strict=True)]:
        if FORMULA.search(prose(section)):
            wrong += waiting
            waiting = [heading]
        code = "".join(re.findall(r"^```python\n(.*?)^```$", section, re.DOTALL | re.MULTILINE))
        if re.search(r"^ *assert |assert_\w+\(|^True$", code, re.MULTILINE):
            waiting = []
    return wrong + waiting


@pytest.mark.parametrize("page", WITH_FORMULAS)
def test_formulas_have_code_beside_them_that_compares(page):
    assert formulas_without_code((ROOT / page).read_text(encoding="utf-8")) == []


def test_a_formula_without_code_is_found():
    compared = "## A\n\n$$\na = b\n$$\n\n```python\nassert a == b\n```\n"
    assert formulas_without_code(compared) == []
    assert formulas_without_code(compared.replace("assert", "print")) == ["A"]
    for formula in ("as $x \\le y$ says", "the root √((1 − p)/N)", "    ∂L/∂x = 2"):
        assert formulas_without_code(f"## B\n\n{formula}\n\n{compared}") == ["B"]
    assert formulas_without_code("## C\n\nof $n$ keys, in `$HOME` and ~$x\n") == []


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
