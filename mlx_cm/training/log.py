"""The log of a run: a CSV with a row for each window of steps."""

import csv
import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_cm.storage import atomic_file, disk_errors
from mlx_cm.training.loop import StepReport

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
        rows = [row for row in read_log(path) if row[STEP] <= step]
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
        if not self._columns:
            self._columns = list(row)
            self._write([])
        with disk_errors(self.path), self.path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self._columns, extrasaction="ignore").writerow(row)

    def _write(self, rows: list[dict[str, float]]) -> None:
        text = io.StringIO()
        if self._columns:
            writer = csv.DictWriter(text, self._columns)
            writer.writeheader()
            writer.writerows(rows)
        with atomic_file(self.path) as partial:
            partial.write_text(text.getvalue(), encoding="utf-8")


def read_log(path: Path) -> list[dict[str, float]]:
    """The rows of a log; a last one that was cut off is left out."""
    if not path.is_file():
        return []
    rows = []
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            try:
                numbers = {name: float(value) for name, value in row.items()}
            except (TypeError, ValueError):
                continue
            rows.append(numbers | {STEP: int(numbers[STEP])})
    return rows
