"""What `scripts/benchmark.py` refuses."""

import runpy
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "benchmark.py"


@pytest.mark.parametrize("option", ["--rounds", "--batch", "--threads"])
@pytest.mark.parametrize("value", ["0", "-1", "x"])
def test_a_number_that_is_no_count(monkeypatch, capsys, option, value):
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "attention", f"{option}={value}"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert end.value.code == 2
    assert f"argument {option}: must be an integer of at least 1; got {value}" in capsys.readouterr().err
