"""Disks that fill: what was there stays, nothing is left behind, and the run goes on once there is room."""

import csv
import os
import resource
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from lightning_modules import cli, noise_sweep
from lightning_modules.checkpoints import read_checkpoint

LAST = Path("disk/a/checkpoints/last.ckpt")


@pytest.fixture
def disk():
    """A file system of 400 KiB."""
    Path("disk").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", "disk"]
    if os.geteuid() or not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small file system takes root")
    yield Path("disk").absolute()
    subprocess.run(["umount", "-l", "disk"], check=True)


@pytest.fixture
def disk_fit(fit):
    """A run on the disk, whose schedule does not depend on its length."""

    def disk_fit(*options):
        return fit("--trainer.default_root_dir", "disk", "--model.schedule", "constant", "--run", "a", *options)

    return disk_fit


def fill(left):
    """Leaves so many KiB of the disk."""
    Path("disk/filler").unlink(missing_ok=True)
    status = os.statvfs("disk")
    Path("disk/filler").write_bytes(b"\0" * max(0, status.f_bavail * status.f_frsize - left * 1024))


def contents():
    return {
        str(path): path.read_bytes() for path in Path("disk").rglob("*") if path.is_file() and path.name != "filler"
    }


def rows():
    with open("disk/a/metrics.csv") as file:
        found = list(csv.DictReader(file))
    for row in found:
        assert row.pop("train_characters_per_second") is not None and None not in {*row, *row.values()}  # a whole row
    return found


def same(first, second):
    first, second = first["state_dict"], second["state_dict"]
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("left", [0, 4, 12, 28, 60])
def test_a_run_goes_on_once_there_is_room(disk, disk_fit, capsys, left):
    assert disk_fit("--trainer.max_steps", "5") == 0
    before = contents()
    fill(left)
    capsys.readouterr()
    onwards = ["--trainer.max_steps", "400", "--ckpt_path", "last"]
    assert disk_fit(*onwards) == 1
    said = capsys.readouterr().err
    line = said.splitlines()[-1]
    assert line.startswith("qattn: error: disk/a") or line.startswith(f"qattn: error: {disk}/a")
    assert line.endswith(": no space left on device; make room there")
    assert "Traceback" not in said and "Error" not in said
    after = contents()
    assert not [path for path in after.keys() - before.keys() if "events" not in path and "best.ckpt" not in path]
    assert 5 <= read_checkpoint(LAST)["global_step"] < 400
    assert rows()
    Path("disk/filler").unlink()
    onwards[1] = str(read_checkpoint(LAST)["global_step"] + 9)
    assert disk_fit(*onwards) == 0
    broken, broken_rows = read_checkpoint(LAST), rows()
    shutil.rmtree("disk/a")
    assert disk_fit("--trainer.max_steps", onwards[1]) == 0
    assert same(broken, read_checkpoint(LAST)) and broken_rows == rows()


def test_a_run_that_finds_no_room_leaves_nothing(disk, disk_fit, capsys):
    fill(8)
    assert disk_fit("--trainer.max_steps", "5") == 1
    assert "no space left on device; make room there" in capsys.readouterr().err
    assert not contents() and not Path("disk/a").exists()


def test_what_commands_write_is_whole_or_not_there(fit, disk, capsys):
    pytest.importorskip("transformers")
    small = ["--trainer.default_root_dir", "runs", "--run", "a", "--trainer.max_steps", "2"]
    assert fit(*small, "--model.attention", "qisa") == 0
    checkpoint = ["--checkpoint", "runs/a/checkpoints/last.ckpt"]
    for number, command in enumerate(
        (
            ["export-hf", *checkpoint, "--output", "disk/hf"],
            ["export-hf", *checkpoint, "--output", "disk/hf"],
            ["predict", "--ckpt_path", checkpoint[1], "--output", "disk/predictions.jsonl"],
            ["export-qasm", *checkpoint, "--text", "the", "--output", "disk/qasm"],
            ["draw", *checkpoint, "--output", "disk/circuit.png"],
            ["certify", checkpoint[1], "--json", "disk/certificate.json"],
            ["report", checkpoint[1], "--output", "disk/report", "--sample_length", "2"],
            ["new", "--output", "disk/mine.yaml"],
        )
    ):
        fill(0 if number else 8)  # with room for the configuration, not for the weights
        assert cli.main(command) == 1
        assert capsys.readouterr().err.endswith(": no space left on device; make room there\n")
        assert not contents()


def test_a_limit_on_the_size_of_files(disk_fit, capsys):
    assert disk_fit("--trainer.max_steps", "5") == 0
    before = LAST.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
        assert disk_fit("--trainer.max_steps", "9", "--ckpt_path", "last") == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    line = capsys.readouterr().err.splitlines()[-1]
    limit = "file too large; raise the limit on the size of files, or choose another place"
    assert line == f"qattn: error: {LAST}: {limit}"
    assert LAST.read_bytes() == before and sorted(os.listdir(LAST.parent)) == ["best.ckpt", "last.ckpt"]
    assert disk_fit("--trainer.max_steps", "9", "--ckpt_path", "last") == 0


def test_a_row_of_a_sweep_is_whole_or_not_there(disk):
    table = noise_sweep.Rows(disk / "rows.csv")
    table.begin()
    header = table.path.read_text()
    row = noise_sweep.Row.from_csv({name: "1" for name in noise_sweep.Row.__dataclass_fields__})
    fill(0)
    with pytest.raises(OSError) as error:
        for _ in range(999):
            table.add(row)
    assert cli.one_line(error.value) == f"{table.path}: no space left on device; make room there"
    text = table.path.read_text()
    assert text.startswith(header) and text.endswith("\n") and len({*text.splitlines()}) == 2
