"""The record of a run as CSV files that a continued run goes on with.

Lightning's `CSVLogger` deletes what it finds. Here, rows up to the step at which the run is continued stay, and those
that the interrupted run wrote after its last checkpoint are dropped, since the continued run writes them again. In a
run with a label, as LEAKS, every row of every table has it in the column `causality`.
"""

import contextlib
import csv
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lightning_modules.files import atomic_write, whole_rows

#: The column of the label.
LABEL = "causality"


class _Rows(ExperimentWriter):
    """One CSV file with a column `step`; rows are appended, and a new header means a new file.

    Args:
        log_dir: its folder.
        name: its name.
        resume_step: rows of earlier steps stay; `None`: none do.
    """

    metrics: list[dict[str, Any]]
    metrics_keys: list[str]

    def __init__(self, log_dir: str, name: str, resume_step: int | None):
        self.NAME_METRICS_FILE = name
        self.resume_step = -1 if resume_step is None else resume_step
        self.label = ""
        self._is_open = False
        super().__init__(log_dir)

    def _check_log_dir_exists(self) -> None:
        """Here Lightning deletes the file. What is kept of it is decided at the first writing, not before."""

    def save(self) -> None:
        if self.metrics and not self._is_open:
            self._keep_earlier_rows()
            self._is_open = True
        if self.label:
            self.metrics = [{**row, LABEL: self.label} for row in self.metrics]
        self._widen()
        with whole_rows(self.metrics_file_path):
            super().save()

    def _widen(self) -> None:
        """A header with all columns, before rows are appended to what is there."""
        keys = list(self.metrics_keys)
        if self.metrics and self._record_new_keys() and Path(self.metrics_file_path).is_file():
            try:
                self._rewrite_with_new_header(self.metrics_keys)
            except BaseException:
                self.metrics_keys = keys
                raise

    def relabel(self, label: str) -> None:
        """From now on every row has the label, those that are written already too."""
        self.label = label
        if self._is_open:
            self._rewrite_with_new_header(self.metrics_keys)

    def _keep_earlier_rows(self) -> None:
        path = Path(self.metrics_file_path)
        if not path.is_file():
            return
        text = path.read_text(encoding="utf-8")
        complete = text[: text.rfind("\n") + 1]  # without the row that the end of the process has torn
        reader = csv.DictReader(complete.splitlines())
        header = list(reader.fieldnames or [])
        rows = [row for row in reader if self._is_earlier(row.get("step"))]
        if rows:
            self.metrics_keys = header
            self._write(rows)
        else:
            path.unlink()

    def _is_earlier(self, step: str | None) -> bool:
        return (step or "").isdecimal() and int(step) < self.resume_step

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        with open(self.metrics_file_path, newline="") as file:
            self._write(list(csv.DictReader(file)))

    def _write(self, rows: list[dict[str, str]]) -> None:
        if self.label:
            rows = [{**row, LABEL: self.label} for row in rows]
            self.metrics_keys = sorted({*self.metrics_keys, LABEL})
        with atomic_write(self.metrics_file_path, "w") as file:
            writer = csv.DictWriter(file, self.metrics_keys)
            writer.writeheader()
            writer.writerows(rows)


class RunCSVLogger(CSVLogger):
    """Writes `metrics.csv`, and further tables, into the folder of a run.

    Args:
        folder: the folder of the run.
        resume_step: the step at which the run is continued; `None`: it is a new one.
    """

    _experiment: ExperimentWriter | None

    def __init__(self, folder: str | Path, resume_step: int | None = None):
        folder = Path(folder)
        super().__init__(str(folder.parent), name="", version=folder.name)
        self.resume_step = resume_step
        self._label = ""
        self._tables: dict[str, _Rows] = {}

    @property
    def label(self) -> str:
        """What stands in the column `causality` of every row; without it there is no such column."""
        return self._label

    @label.setter
    def label(self, label: str) -> None:
        self._label = label
        for table in self._tables.values():
            table.relabel(label)

    @property
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        if self._experiment is None:
            self._experiment = self._table("metrics")
        return self._experiment

    @rank_zero_only
    def log_row(self, table: str, row: Mapping[str, Any], step: int) -> None:
        """Adds a row to the file `<table>.csv`; its columns are `row`'s and `step`."""
        self._table(table).log_metrics(dict(row), step)

    def _table(self, name: str) -> _Rows:
        if name not in self._tables:
            self._tables[name] = _Rows(self.log_dir, f"{name}.csv", self.resume_step)
            self._tables[name].label = self._label
        return self._tables[name]

    @rank_zero_only
    def save(self) -> None:
        for table in self._tables.values():
            table.save()

    def finalize(self, status: str) -> None:
        self.save()


@contextlib.contextmanager
def without_tracebacks_of_threads() -> Iterator[None]:
    """The thread that writes TensorBoard's events says nothing: its error is raised again where one logs next."""
    hook = threading.excepthook

    def say(args: threading.ExceptHookArgs) -> None:
        if not type(args.thread).__module__.startswith("tensorboard."):
            hook(args)

    threading.excepthook = say
    try:
        yield
    finally:
        threading.excepthook = hook


def set_label(logger: Logger, label: str) -> None:
    """Has a logger write the label from now on: in a column of its tables, else in front of every name."""
    if isinstance(logger, RunCSVLogger):
        logger.label = label
        return
    prefix = getattr(logger, "_prefix", None) or ""  # what the loggers of Lightning put in front
    if label not in prefix.split("-"):
        logger._prefix = f"{label}-{prefix}" if prefix else label
