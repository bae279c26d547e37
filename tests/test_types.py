"""What is public says its types: every function and method, and what mypy makes of a program that uses them."""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_modules
import pennylane_qattn

ROOT = Path(__file__).resolve().parent.parent
PUBLIC = [(package, name) for package in (pennylane_qattn, lightning_modules) for name in package.__all__]

#: A program of a user's, with what each thing is, and, marked, what must be refused.
PROGRAM = """
from typing import assert_type

from torch import Tensor

from lightning_modules import GPT, Corpus, GPTConfig, Tokenizer, load_corpus, preset
from pennylane_qattn import Attention, Certificate, Circuit, Execution, KeyValueCache, Plan
from pennylane_qattn import build_attention, certify, set_execution, to_openqasm

attention = build_attention("qisa", embed_dim=16, num_heads=2, block_size=32)
assert_type(attention, Attention)
assert_type(attention.new_cache(batch_size=4), KeyValueCache)
assert_type(certify(attention), Certificate)
assert_type(certify(attention).summary(), str)
plans: list[Plan] = list(set_execution(attention, Execution(executor="qnode")))
assert_type(preset("qisa-16"), GPTConfig)
circuit = Circuit(num_features=4, words=("ZI", "XX"))
build_attention("qisa", embed_dim="16", num_heads=2, block_size=32)  # wrong
Execution(device=7)  # wrong
GPTConfig(vocab_size="many")  # wrong
"""


def parameters_without_type(function: object) -> list[str]:
    signature = inspect.signature(function)
    names = list(signature.parameters.values())
    missing = [p.name for p in names if p.annotation is p.empty and p.name not in ("self", "cls")]
    return missing + (["return"] if signature.return_annotation is signature.empty else [])


def own_functions(cls: type) -> dict[str, object]:
    """Public methods that a class defines for the first time; what overrides another has its types from that."""
    found = {}
    for name, value in vars(cls).items():
        known = any(name in vars(base) for base in cls.__mro__[1:])
        function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
        if inspect.isfunction(function) and not known and (name == "__init__" or not name.startswith("_")):
            found[name] = function
    return found


@pytest.mark.parametrize("package, name", PUBLIC, ids=[f"{package.__name__}.{name}" for package, name in PUBLIC])
def test_what_is_public_says_its_types(package, name):
    value = getattr(package, name)
    functions = own_functions(value) if inspect.isclass(value) else {name: value} if inspect.isfunction(value) else {}
    missing = {name: found for name, function in functions.items() if (found := parameters_without_type(function))}
    assert not missing


def test_a_missing_type_is_found():
    def half(x: int, y) -> int: ...

    def silent(x: int): ...

    assert (parameters_without_type(half), parameters_without_type(silent)) == (["y"], ["return"])


@pytest.mark.slow
def test_a_users_program_is_checked_against_the_packages(tmp_path):
    """Without the settings of this repository, as mypy would run elsewhere."""
    pytest.importorskip("mypy", reason="mypy is of the extra test")
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "empty.ini").write_text("[mypy]\n")
    command = [sys.executable, "-m", "mypy", "--config-file", "empty.ini", "--follow-imports", "silent", "program.py"]
    environment = os.environ | {"MYPYPATH": str(ROOT)}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    found = {int(line.split(":")[1]) for line in run.stdout.splitlines() if line.startswith("program.py:")}
    wanted = {number for number, line in enumerate(PROGRAM.splitlines(), 1) if line.endswith("# wrong")}
    assert found == wanted, run.stdout
