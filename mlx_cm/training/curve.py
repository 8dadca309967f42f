"""The curve of a run's loss."""

import logging
from pathlib import Path

from mlx_cm.storage import atomic_file
from mlx_cm.training.log import SPEED, STEP, read_log

log = logging.getLogger("mlx_cm")

LOGARITHMIC_FROM = 20.0  # ratio of the greatest to the least value from which on an axis is logarithmic


def draw_curve(source: Path, path: Path) -> bool:
    """Draws loss, metrics and curriculum of a log over the steps, one under the other.

    Returns:
        Whether it was drawn: there have to be two rows, and matplotlib, which comes with `pip install 'mlx-cm[train]'`.

    Raises:
        DiskError: the file cannot be written.
    """
    rows = read_log(source)
    if len(rows) < 2:
        return False
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        log.info("no curve is drawn: install mlx-cm[train]")
        return False
    names = [name for name in rows[0] if name not in (STEP, SPEED) and len({row[name] for row in rows}) > 1]
    figure = Figure(figsize=(7, 1.8 * max(len(names), 1)), layout="constrained")
    steps = [row[STEP] for row in rows]
    for axes, name in zip(
        figure.subplots(max(len(names), 1), 1, sharex=True, squeeze=False)[:, 0], names, strict=False
    ):
        values = [row[name] for row in rows]
        axes.plot(steps, values, linewidth=1)
        axes.set_ylabel(name)
        if min(values) > 0 and max(values) > LOGARITHMIC_FROM * min(values):
            axes.set_yscale("log")
        axes.grid(alpha=0.3)
    figure.axes[-1].set_xlabel(STEP)
    with atomic_file(path) as partial:
        FigureCanvasAgg(figure).print_png(str(partial))
    return True
