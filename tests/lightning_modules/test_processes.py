"""Several processes of one run: who tells of an error, and what they hold together."""

from types import SimpleNamespace

import pytest
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lightning_modules import cli, processes
from lightning_modules.processes import LostProcessError, as_lost, gather, in_turns, of_all_processes


@pytest.mark.parametrize(
    ("process", "error", "status", "line"),
    [
        (0, of_all_processes(KeyError("a")), 1, "qattn: error: KeyError: 'a' (QATTN_DEBUG=1 shows where)\n"),
        (3, of_all_processes(KeyError("a")), 0, ""),
        (0, ValueError("b"), 2, "qattn: error: b\n"),
        (3, ValueError("b"), 2, "qattn: error: process 3: b\n"),
        (0, LostProcessError("c"), 1, "qattn: error: c\n"),
    ],
)
def test_what_all_processes_have_is_told_once(monkeypatch, capsys, process, error, status, line):
    def fails(argv):
        raise error

    monkeypatch.setattr(rank_zero_only, "rank", process)
    monkeypatch.setattr(cli, "_run", fails)
    assert cli.main([]) == status
    assert capsys.readouterr().err == line


def test_what_was_shared_out_in_turns_comes_together():
    windows = list(range(11))
    assert in_turns([windows[rank::3] for rank in range(3)]) == windows
    assert in_turns([[]]) == [] and gather({"a": 1}) == [{"a": 1}]


def test_the_loss_of_another_process_is_told_from_other_errors():
    trainer = SimpleNamespace(world_size=2, global_step=7)
    gone = RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:5")
    assert "another of the 2 processes has ended at step 7" in str(as_lost(gone, trainer))
    assert as_lost(RuntimeError("mat1 and mat2 shapes cannot be multiplied"), trainer) is None
    assert as_lost(KeyError("gloo"), trainer) is None
    assert as_lost(gone, SimpleNamespace(world_size=1, global_step=7)) is None


def test_only_processes_that_this_one_has_started_are_ended():
    sent = []
    launcher = SimpleNamespace(procs=[1], kill=sent.append)
    processes.end_others(SimpleNamespace(strategy=SimpleNamespace(launcher=launcher)))
    processes.end_others(SimpleNamespace(strategy=SimpleNamespace(launcher=None)))
    assert sent == [9]
