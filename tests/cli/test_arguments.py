"""Options and configs: abbreviations, help, and mistakes in them as one line with a remedy."""

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Union

import lightning as L
import pytest

from lightning_modules import cli
from lightning_modules.arguments import Parser, explain, parse

ROOT = Path(__file__).parents[2]


@pytest.fixture
def parser():
    parser = Parser(prog="qattn x")
    parser.add_argument("--config", action="config")
    parser.add_argument("--model.block_size", type=int | None)
    parser.add_argument("--model.attention", type=str)
    parser.add_argument("--flag", action="store_true")
    return parser


BATCHES = tuple(f"trainer.limit_{what}_batches" for what in ("train", "val", "test", "predict"))
EITHER = (*BATCHES, "trainer.overfit_batches", "trainer.val_check_interval", "trainer.gradient_clip_val")


def kinds(texts=("1", "1.0")):
    """The types of what is read for each text, by option."""
    parser = cli.parser_of("fit")
    return {name: [type(parser.parse_args([f"--{name}", text])[name]).__name__ for text in texts] for name in EITHER}


@pytest.mark.parametrize("union", [Union[int, float, None], Union[float, int, None]])  # noqa: UP007 the order counts
def test_a_number_of_batches_is_an_int_and_a_share_a_float(monkeypatch, union):
    for name in EITHER:
        monkeypatch.setitem(L.Trainer.__init__.__annotations__, name.removeprefix("trainer."), union)
    assert kinds() == dict.fromkeys(EITHER, ["int", "float"])


@pytest.mark.parametrize("first", ["lightning", "pennylane, torchmetrics.text"])
def test_whatever_is_imported_first(first):
    """Of which the second one makes `typing` put float before int in Lightning's own hints."""
    code = f"import {first}; from tests.cli.test_arguments import kinds; print(kinds())"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout == f"{dict.fromkeys(EITHER, ['int', 'float'])}\n"


# Messages of jsonargparse 4.53, shortened.
@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            'Parser key "model.block_size":\n  Does not validate against any of the Union subtypes\n'
            "  Subtypes: [<class 'int'>, <class 'NoneType'>]\n  Errors:\n    - Expected a <class 'int'>\n"
            "    - Expected a <class 'NoneType'>\n  Given value type: <class 'str'>\n  Given value: x",
            "model.block_size: expected int or null; got x",
        ),
        (
            "Parser key \"model.schedule\":\n  Expected a typing.Literal['constant', 'cosine']. Got value: linear",
            "model.schedule: expected one of 'constant', 'cosine'; got linear",
        ),
        (
            'Parser key "model.attention":\n  Does not validate against any of the Union subtypes\n'
            "  Subtypes: [<class 'Mechanism'>, <class 'str'>]\n  Errors:\n"
            "    - Problem with given class_path 'pennylane_qattn.QISA':\n        Option 'foo' is not accepted\n"
            "    - Expected a <class 'str'>\n  Given value type: <class 'NestedArg'>\n  Given value: foo",
            "model.attention: QISA has no option 'foo'; see qattn x --model.attention.help QISA",
        ),
        (
            'Parser key "model.attention":\n  Does not validate against any of the Union subtypes\n'
            "  Subtypes: [<class 'Mechanism'>, <class 'str'>]\n  Errors:\n"
            "    - Problem with given class_path 'pennylane_qattn.QISA':\n"
            '        Parser key "ansatz":\n          Does not validate against any of the Union subtypes\n'
            "          Subtypes: [<class 'Ansatz'>, <class 'str'>]\n          Errors:\n"
            "            - Problem with given class_path 'pennylane_qattn.BasicEntangler':\n"
            "                Parser key \"layers\":\n                  Expected a <class 'int'>. Got value: x\n"
            "            - Expected a <class 'str'>\n          Given value type: <class 'dict'>\n"
            "          Given value: {'class_path': 'pennylane_qattn.BasicEntangler', 'init_args': {'layers': 'x'}}\n"
            "    - Expected a <class 'str'>\n  Given value type: <class 'dict'>\n  Given value: {'class_path': 'y'}",
            "model.attention.ansatz.layers: expected int; got x",
        ),
        (
            'Parser key "trainer.logger":\n\n  - Expected a path but 3 either not accessible or invalid\n'
            "  - Does not validate against any of the Union subtypes\n  Subtypes: [<class 'Logger'>, <class 'bool'>]\n"
            "  Errors:\n    - Expected a dot import path string: 3\n    - Expected a <class 'bool'>\n"
            "  Given value type: <class 'str'>\n  Given value: 3",
            "trainer.logger: expected a class or bool; got 3",
        ),
        (
            "Group 'model' does not accept option 'blocksize'",
            "unknown option 'model.blocksize'; did you mean 'model.block_size'? see qattn x --help",
        ),
        ("unrecognized arguments: --zzz 1", "unknown option 'zzz'; see qattn x --help"),
        ("Expected one of\n  two", "Expected one of two"),
    ],
)
def test_gist_of_a_message_of_the_parser(parser, text, line):
    assert explain(parser, text) == line


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"model: {block_size: x}", "model.block_size: expected int or null; got x"),
        (b"model:\n  - [a: 3\n", "line 3, column 1"),
        (b"", "it holds no options"),
        (b"abc", "it holds no options"),
        (b"- 1", "it holds no options"),
        ("flag: naïf".encode("latin-1"), "is not UTF-8; convert the file"),
    ],
)
def test_a_mistake_in_a_config_names_the_file(parser, tmp_path, content, message):
    (tmp_path / "mine.yaml").write_bytes(content)
    with pytest.raises(ValueError) as error:
        parse(parser, ["--config", "mine.yaml"])
    assert message in str(error.value) and "mine.yaml" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("value", ["3", "[1]", "null"])
def test_a_group_of_options_is_no_value(refused, value, tmp_path):
    (tmp_path / "mine.yaml").write_text(f"model: {value}")
    line = refused("fit", "--config", "mine.yaml")
    assert line.startswith("mine.yaml: model must hold options, as in 'model: {name: value}'; got ")
    assert "model must hold options" in refused("compare", "--mechanisms", "{a: qisa}", "--fit", f"{{model: {value}}}")


def test_no_command_takes_abbreviations(parser, refused):
    with pytest.raises(ValueError, match="unknown option 'fla'; did you mean 'flag'"):
        parse(parser, ["--fla"])
    assert refused("fit", "--ru", "x") == "unknown option 'ru'; did you mean 'run'? see qattn fit --help"
    assert "did you mean 'seeds'? see qattn compare --help" in refused("compare", "--seed", "[1]")
    line = refused("generate", "--checkpoint", "x", "--promt", "y")
    assert line == "unknown option 'promt'; did you mean 'prompt'? see qattn generate --help"


def test_the_help_of_a_class_names_the_command(capsys):
    from lightning_modules import cli

    assert cli.main(["fit", "--model.attention.help", "qisa"]) == 0
    assert capsys.readouterr().out.startswith("usage: qattn [--model.attention.")


def test_errors_of_inner_parsers_stay_those_of_jsonargparse(parser):
    with pytest.raises(argparse.ArgumentError):
        parser.parse_args(["--model.block_size", "x"])
