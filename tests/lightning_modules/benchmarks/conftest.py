"""The program on tiny sizes, attentions with faults, and a result made by hand."""

from dataclasses import dataclass

import pytest
import torch

from lightning_modules.benchmarks.command import main
from lightning_modules.benchmarks.result import Column, Result, Target
from pennylane_qattn import ATTENTION, Classical


@pytest.fixture(autouse=True)
def _threads_stay():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def run(tmp_path, capsys):
    """Runs `benchmark.py` with some arguments, its files in a folder of the test: exit status, stdout, stderr."""

    def call(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        status = main([*arguments, "--output", str(tmp_path / "results")])
        return status, *capsys.readouterr()

    call.folder = tmp_path / "results"
    return call


@pytest.fixture
def plant():
    """Registers a mechanism whose attention is of a given class, for the time of the test."""
    before = dict(ATTENTION)

    def register(attention: type, called: str = "planted") -> str:
        @dataclass(frozen=True, kw_only=True)
        class Planted(Classical):
            name = called
            attention_class = attention

        ATTENTION.register(Planted)
        return called

    yield register
    ATTENTION.clear()
    ATTENTION.update(before)


@pytest.fixture
def result():
    """Two mechanisms; one keeps its target, the other does not, and has cells without a number."""
    columns = (
        Column("mechanism", "mechanism"),
        Column("parameters", "parameters"),
        Column("time", "time", targets=(Target(1.5), Target(2.5, at_least=True, rows=("b|c",))), drawn=True),
        Column("memory", "memory", drawn=True),
    )
    rows = (
        {"mechanism": "a", "parameters": 12345, "time": [1.25, 1.0, 1.75], "memory": 0.5, "bytes": 77},
        {"mechanism": "b|c", "parameters": 7, "time": [2.0, 250.0, 3.0], "memory": None},
    )
    machine = {"processor": "an *abacus*", "cores": 2}
    return Result("sample", "Time over nothing", "of size 3", "python x", machine, columns, rows, ("a note",))
