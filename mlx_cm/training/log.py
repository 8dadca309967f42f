"""The log of a run: a CSV with a row for each window of steps."""

import csv
import io
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_cm.storage import atomic_file, disk_errors
from mlx_cm.training.loop import StepReport

log = logging.getLogger("mlx_cm")

STEP, SPEED = "step", "images_per_second"


class TrainingLog:
    """Means over the steps since the last row.

    Args:
        path: the file; rows behind `step`, which a resumed run makes again, are dropped.
        step: steps done.
        window: what had been added since the last row when the run stopped.
    """

    def __init__(self, path: Path, step: int, window: Mapping[str, list[float]]):
        self.path = path
        self.window: dict[str, list[float]] = {name: list(values) for name, values in window.items()}
        self._step = step
        self._latest: dict[str, Any] = {}
        rows = [row for row in _read_rows(path) if int(row[STEP]) <= step]
        self._columns = list(rows[0]) if rows else []
        self._write(rows)

    def add(self, report: StepReport, described: Mapping[str, float], speed: float) -> None:
        """Takes in a step; numbers that are not finite, as of a skipped step, are left out."""
        values = {"loss": report.loss, **report.metrics, "gradient_norm": report.gradient_norm, SPEED: speed}
        for name, value in values.items():
            self.window.setdefault(name, [])
            if math.isfinite(value):
                self.window[name].append(value)
        self._step = report.step
        self._latest = {"learning_rate": report.learning_rate, **described}

    def write_row(self) -> None:
        """Adds a row of the window's means and begins a new window."""
        means = {name: sum(values) / len(values) if values else math.nan for name, values in self.window.items()}
        row = {STEP: self._step, **means, **self._latest}
        self.window = {}
        if set(row) - set(self._columns):  # the first row, or settings that were changed when the run was resumed
            self._columns = list(dict.fromkeys([*self._columns, *row]))
            self._write(_read_rows(self.path))
        with disk_errors(self.path), self.path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self._columns).writerow(row)

    def flush(self) -> None:
        """Makes sure that the rows are on the disk, as the checkpoint that is about to be written will be."""
        with disk_errors(self.path), self.path.open("rb+") as file:
            os.fsync(file.fileno())

    def _write(self, rows: list[dict[str, str]]) -> None:
        text = io.StringIO()
        if self._columns:
            writer = csv.DictWriter(text, self._columns)
            writer.writeheader()
            writer.writerows(rows)
        with atomic_file(self.path) as partial:
            partial.write_text(text.getvalue(), encoding="utf-8")


def read_log(path: Path) -> list[dict[str, float]]:
    """The rows of a log as numbers, NaN where a row has none; damaged rows are left out."""
    rows = ({name: float(value or "nan") for name, value in row.items()} for row in _read_rows(path))
    return [row | {STEP: int(row[STEP])} for row in rows]


def _read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a log as they are written; what is cut off or damaged is left out, with a warning."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    rows = list(csv.DictReader(lines))
    whole = [row for row in rows if _is_whole(row)]
    if len(whole) < len(rows):
        log.warning("%s: damaged rows are left out: %d", path, len(rows) - len(whole))
    return whole


def _is_whole(row: dict[str, str]) -> bool:
    try:
        numbers = [float(value or "nan") for value in row.values() if value is not None]
        return len(numbers) == len(row) and int(row[STEP]) >= 0
    except (KeyError, TypeError, ValueError):
        return False
