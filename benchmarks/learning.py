"""Whether each objective of pixel space learns: small runs on handwritten digits, and how near to them samples come.

    python benchmarks/learning.py                     # every run, then the report; goes on where it was stopped
    python benchmarks/learning.py --only cd ct        # some, with the teacher that they need
    python benchmarks/learning.py --steps-scale 0.1   # a tenth of the steps, in a folder of its own: a look, no result

The runs are the recipes digits-*.toml; they stay in --work. The report goes to --report: tables, curves as CSV and as
pictures, samples. The end is exit code 1 where something that is claimed of the runs reported on does not hold.
"""

import argparse
import csv
import io
import itertools
import math
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx_cm  # isort: skip (before MLX, for which it prepares)
import harness
import mlx.core as mx
import numpy as np
from digits import FeatureSpace, classifier_space, digits, pixel_space, write_data
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tables import Table

from mlx_cm.errors import MlxCmError
from mlx_cm.pipelines.pixel import ConsistencyModelPipeline
from mlx_cm.storage import atomic_file, read_json, write_json
from mlx_cm.training.checkpoints import checkpoint_folders, load_checkpoint
from mlx_cm.training.log import STEP, read_log
from mlx_cm.training.loop import StepReport
from mlx_cm.training.models import build_trainee
from mlx_cm.training.run import train
from mlx_cm.training.run_folder import CHECKPOINTS, CONFIG, LOG, MODEL
from mlx_cm.training.settings import read_settings

Pictures = np.ndarray  # uint8, (N, H, W)
Spaces = Mapping[str, FeatureSpace]  # name of a column => where its distances are taken

FOLDER = Path(__file__).resolve().parent
REPORT, WORK = FOLDER / "learning", FOLDER.parent / "out" / "learning"
POINTS = 10  # of a curve of distances
BATCH = 256  # pictures sampled at once
SHOWN, ENLARGED = 24, 3  # pictures of a row of samples, and how much
MEASURED, COST = "measured.json", "cost.json"
DATA, UNTRAINED, TEACHER = "data", "untrained", "teacher"
TEACHER_STEPS = 18
# What is claimed: one step of a trained model is so many times nearer the data than one step of the teacher, and than
# one of a network without training; two steps are nearer than one.
BETTER = 10
DISTANCE, IN_PIXELS = "distance", "in_pixels"
DISTANCES = {
    "model": "{title}",
    "steps": "{steps}",
    "noise levels": "{levels}",
    "distance": "{distance:.4f}",
    "in pixels": "{in_pixels:.4f}",
}
RUNS_BETTER, RUNS_SECOND = "one step: teacher's distance ÷ its own", "two steps: distance ÷ one step's"
RUNS = {
    "run": "{title}",
    "recipe": "{recipe}",
    "updates": "{updates}",
    "batch": "{batch}",
    "minutes of processor time": "{minutes:.1f}",
    RUNS_BETTER: "{better:.0f}",
    RUNS_SECOND: "{second:.2f}",
}


@dataclass(frozen=True)
class Experiment:
    """A run, and what is sampled from it."""

    method: str  # of `mlx-cm train`
    title: str
    taught: bool = False  # whether it is given the teacher
    steps: tuple[int, ...] = (1, 2, 4)


# Name => experiment; its recipe is digits-NAME.
EXPERIMENTS = {
    TEACHER: Experiment("teacher", "diffusion teacher", steps=(1, TEACHER_STEPS)),
    "cd": Experiment("cd", "consistency distillation", taught=True),
    "ct": Experiment("ct", "consistency training"),
    "ict": Experiment("ict", "improved consistency training"),
    "ect": Experiment("ict", "easy consistency tuning", taught=True),
    "ctm": Experiment("ctm", "consistency trajectories", taught=True),
}


# --- training


def recipe(name: str) -> str:
    """The name of an experiment's recipe."""
    return f"digits-{name}"


def run_experiment(name: str, work: Path, data: Path, overrides: Mapping[str, Any]) -> None:
    """Trains to the end, unless that was done; goes on with a run that was stopped.

    Args:
        overrides: what is changed of the recipe.

    Raises:
        KeyboardInterrupt: a signal stopped it.
    """
    experiment, folder = EXPERIMENTS[name], work / name
    if (folder / MODEL).is_dir():
        return
    begun, began = (folder / CONFIG).is_file(), time.process_time()
    given = {
        "data": data,
        "model": work / TEACHER / MODEL if experiment.taught else None,
        "config": recipe(name),
        "overrides": overrides,
    }

    def on_step(report: StepReport, total: int, speed: float) -> None:
        if report.step % max(1, total // 50) == 0:
            harness.progress(f"{name}: step {report.step} of {total}, loss {report.loss:.4g}, {speed:.0f} pictures/s")

    try:
        stopped = train(experiment.method, folder, resume=begun, on_step=on_step, **({} if begun else given)).stopped_by
    finally:
        if folder.is_dir():
            write_atomically(folder / COST, {"seconds": seconds_of(folder) + time.process_time() - began})
    if stopped:
        raise KeyboardInterrupt


def shortened(name: str, steps_scale: float) -> dict[str, Any]:
    """What a run changes of its recipe: its length, and as many checkpoints as a curve has points."""
    chosen = read_settings(EXPERIMENTS[name].method, config=recipe(name)).train
    steps = max(POINTS, round(chosen.steps * steps_scale))
    return {
        "train.steps": steps,
        "train.warmup": round(chosen.warmup * steps_scale),
        "train.checkpoint_every": math.ceil(steps / POINTS),
        "train.keep": POINTS + 1,
        "train.sample_every": 0,
    }


def seconds_of(folder: Path) -> float:
    """Processor time of a run, all processors together, over all the times that it was gone on with."""
    return read_json(folder / COST)["seconds"] if (folder / COST).is_file() else 0.0


def write_atomically(path: Path, value: Mapping[str, Any]) -> None:
    """Writes JSON whole or not at all."""
    with atomic_file(path) as partial:
        write_json(partial, value)


# --- measuring


def sampled(pipeline: ConsistencyModelPipeline, count: int, **settings: Any) -> Pictures:
    """Pictures of the seeds 0, 1, ..., rounded to 8 bits."""
    made = []
    for start in range(0, count, BATCH):
        request = pipeline.resolve(seed=list(range(start, min(start + BATCH, count))), **settings)
        x = np.array(mx.clip(pipeline.sample(request), -1, 1)[..., 0])
        made.append(np.rint((x + 1) * 127.5).astype(np.uint8))
    return np.concatenate(made)


def untrained() -> ConsistencyModelPipeline:
    """The model that consistency training begins with."""
    return build_trainee(read_settings("ct", config=recipe("ct")), None, num_classes=None).pipeline


def distances(spaces: Spaces, pictures: Pictures) -> dict[str, float]:
    """From the data, in every space."""
    return {name: space.distance(pictures) for name, space in spaces.items()}


def asked(steps: int, times: Sequence[float] | None) -> dict[str, Any]:
    """How a pipeline is asked for a number of steps; for two, `times` may say where."""
    return {"times": times} if steps == 2 and times else {"steps": steps}


def measure(name: str, work: Path, spaces: Spaces, count: int, times: Sequence[float] | None) -> dict[str, Any]:
    """Distances of a run's samples, and those of its checkpoints; kept beside the run.

    The checkpoints' weights are the averaged ones, as the result's are.
    """
    experiment, folder = EXPERIMENTS[name], work / name
    kept, key = folder / MEASURED, {"count": count, "times": times and list(times)}
    if kept.is_file() and (found := read_json(kept))["key"] == key:
        return found
    pipeline = mlx_cm.load(str(folder / MODEL), dtype="float32")
    few = [steps for steps in experiment.steps if steps <= 2]
    rows, curve = [], []
    for steps in experiment.steps:
        harness.progress(f"{name}: sampling with {steps} steps")
        levels = pipeline.resolve(**asked(steps, times)).times
        rows.append({"steps": steps, "levels": levels} | distances(spaces, sampled(pipeline, count, times=levels)))
    for checkpoint in map(load_checkpoint, reversed(checkpoint_folders(folder / CHECKPOINTS))):
        harness.progress(f"{name}: sampling at step {checkpoint.step}")
        average = next(arrays for group, arrays in checkpoint.arrays.items() if group.startswith("ema_"))
        pipeline.backbone.load_weights([(key.removeprefix("unet."), value) for key, value in average.items()])
        for steps in few:
            found = distances(spaces, sampled(pipeline, count, **asked(steps, times)))
            curve.append({STEP: checkpoint.step, "steps": steps} | found)
    found = {"key": key, "rows": rows, "curve": curve}
    write_atomically(kept, found)
    return found


# --- the report


@dataclass(frozen=True)
class Findings:
    """What was measured of the runs that are done."""

    baselines: dict[str, dict[str, float]]  # "data": from one half of it to the other; "untrained": one step
    runs: dict[str, dict[str, Any]]  # name => what `measure` found

    def distance(self, name: str, steps: int, which: str = DISTANCE) -> float:
        """Of a run's samples."""
        return next(row[which] for row in self.runs[name]["rows"] if row["steps"] == steps)

    def claims(self) -> dict[str, bool]:
        """What is claimed => whether it holds."""
        start = min(self.baselines[UNTRAINED][DISTANCE], self.distance(TEACHER, 1))
        found = {}
        for name in self.runs:
            if name != TEACHER:
                one, two = (self.distance(name, steps) for steps in (1, 2))
                found[f"{name}: one step is {BETTER} times nearer than the teacher's and the untrained"] = (
                    BETTER * one <= start
                )
                found[f"{name}: two steps are nearer than one"] = two < one
        return found


def distances_table(findings: Findings) -> Table:
    """Every set of samples."""
    titles = {DATA: "half of the data, from the other half", UNTRAINED: "network without training"}
    steps = {DATA: "", UNTRAINED: 1}
    rows = [
        {"title": titles[name], "steps": steps[name], "levels": "", **found}
        for name, found in findings.baselines.items()
    ]
    for name, found in findings.runs.items():
        for row in found["rows"]:
            listed = row["levels"] if row["steps"] <= 4 else (row["levels"][0], math.nan)
            levels = ", ".join("..." if math.isnan(level) else f"{level:.3g}" for level in listed)
            rows.append({"name": name, "title": EXPERIMENTS[name].title, **row, "levels": levels})
    return Table("distances", DISTANCES, rows)


def runs_table(findings: Findings, work: Path) -> Table:
    """What each run took, and what it gained."""
    rows = []
    for name in findings.runs:
        experiment = EXPERIMENTS[name]
        train_settings = read_settings(experiment.method, config=work / name / CONFIG).train
        last = max(experiment.steps) if name == TEACHER else 2
        rows.append({
            "title": experiment.title, "recipe": recipe(name), "updates": train_settings.steps,
            "batch": train_settings.batch_size, "minutes": seconds_of(work / name) / 60,
            "better": findings.distance(TEACHER, 1) / findings.distance(name, 1),
            "second": findings.distance(name, last) / findings.distance(name, 1),
        })  # fmt: skip
    return Table("runs", RUNS, rows)


def write_report(findings: Findings, tables: Sequence[Table], work: Path, report: Path) -> None:
    """Writes tables, curves and samples."""
    report.mkdir(parents=True, exist_ok=True)
    write_text(report / "tables.md", "\n\n".join(table.markdown() for table in tables) + "\n")
    columns = ["run", STEP, "steps", DISTANCE, IN_PIXELS]
    points = [{"run": name, **point} for name, found in findings.runs.items() for point in found["curve"]]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(points)
    write_text(report / "distances.csv", text.getvalue())
    for name in findings.runs:
        shutil.copyfile(work / name / LOG, report / f"{name}.csv")
    save_figure(curves_figure(findings, work), report / "curves.png")
    save_figure(samples_figure(findings, work), report / "samples.png")


def curves_figure(findings: Findings, work: Path) -> Figure:
    """Loss over distance of every run, over its updates."""
    figure = Figure(figsize=(3 * len(findings.runs), 5), layout="constrained")
    axes = figure.subplots(2, len(findings.runs), sharex="col", squeeze=False)
    for column, (name, found) in enumerate(findings.runs.items()):
        loss, distance = axes[:, column]
        rows = read_log(work / name / LOG)
        loss.plot([row[STEP] for row in rows], [row["loss"] for row in rows], linewidth=1)
        loss.set_title(name)
        for steps, points in itertools.groupby(sorted(found["curve"], key=lambda p: p["steps"]), lambda p: p["steps"]):
            points = list(points)
            distance.plot(
                [point[STEP] for point in points], [point[DISTANCE] for point in points],
                marker=".", label=f"{steps} step{'s' * (steps > 1)}",
            )  # fmt: skip
        distance.axhline(findings.distance(TEACHER, 1), color="gray", linestyle="--", label="teacher, 1 step")
        distance.axhline(findings.baselines[DATA][DISTANCE], color="gray", linestyle=":", label="half of the data")
        for one in (loss, distance):
            one.set_yscale("log")
            one.grid(alpha=0.3)
        distance.set_xlabel("updates")
    axes[0, 0].set_ylabel("loss")
    axes[1, 0].set_ylabel("distance")
    axes[1, -1].legend(fontsize=8)
    return figure


def samples_figure(findings: Findings, work: Path) -> Figure:
    """Pictures of the data, and samples of the same noise from every model."""
    rows = {"data": digits()[0][:SHOWN]}
    for name, found in findings.runs.items():
        pipeline = mlx_cm.load(str(work / name / MODEL), dtype="float32")
        for row in found["rows"]:
            rows[f"{name}, {row['steps']}"] = sampled(pipeline, SHOWN, times=row["levels"])
    figure = Figure(figsize=(10, 0.45 * len(rows)), layout="constrained")
    for axes, (title, pictures) in zip(figure.subplots(len(rows), 1, squeeze=False)[:, 0], rows.items(), strict=True):
        framed = np.pad(pictures, ((0, 0), (1, 1), (1, 1)), constant_values=255)
        axes.imshow(np.concatenate(list(framed), axis=1), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axes.set_ylabel(title, rotation=0, ha="right", va="center")
        axes.set(xticks=[], yticks=[])
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Writes a figure whole or not at all."""
    with atomic_file(path) as partial:
        FigureCanvasAgg(figure).print_png(str(partial))


def write_text(path: Path, text: str) -> None:
    """Writes text whole or not at all."""
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


# --- the command


def chosen_experiments(only: Sequence[str]) -> list[str]:
    """The experiments to run, each after what it needs."""
    wanted = set(only or EXPERIMENTS) | {TEACHER}
    return [name for name in EXPERIMENTS if name in wanted]


def run(
    names: Sequence[str], work: Path, *, steps_scale: float, count: int | None, times: Sequence[float] | None
) -> Findings:
    """Trains some, and measures all that are done.

    Args:
        count: samples of each kind; None: as many as the data has pictures.
    """
    work.mkdir(parents=True, exist_ok=True)
    pictures, labels = digits()
    data = work / "digits.npz"
    if not data.is_file():
        write_data(data, pictures)
    spaces = {DISTANCE: classifier_space(pictures, labels), IN_PIXELS: pixel_space(pictures)}
    count = count or len(pictures)
    halves = {name: space.distance(pictures[1::2], pictures[::2]) for name, space in spaces.items()}
    baselines = {DATA: halves, UNTRAINED: distances(spaces, sampled(untrained(), count, steps=1))}
    for name in names:
        run_experiment(name, work, data, shortened(name, steps_scale))
    done = [name for name in EXPERIMENTS if (work / name / MODEL).is_dir()]
    return Findings(baselines, {name: measure(name, work, spaces, count, times) for name in done})


def levels(text: str) -> list[float]:
    """Noise levels as argparse wants them: 20,1.2."""
    return [float(part) for part in text.split(",")]


def main() -> None:
    """Trains, measures, reports and checks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(EXPERIMENTS), default=[], help="some of the runs")
    parser.add_argument("--steps-scale", type=float, default=1.0, help="how much of each recipe's updates (default: 1)")
    parser.add_argument("--count", type=harness.positive, help="samples of each kind (default: as many as the data)")
    parser.add_argument(
        "--times", type=levels, help="noise levels of two steps (default: the first, and the middle of the grid)"
    )
    parser.add_argument("--work", type=Path, help=f"folder of the runs (default: {WORK.relative_to(FOLDER.parent)})")
    parser.add_argument(
        "--report", type=Path, help=f"folder of the report (default: {REPORT.relative_to(FOLDER.parent)})"
    )
    arguments = parser.parse_args()
    scale = arguments.steps_scale
    suffix = "" if scale == 1 else f"-{scale:g}"
    work = arguments.work or WORK.with_name(WORK.name + suffix)
    report = arguments.report or (REPORT if scale == 1 else work / "report")
    names = chosen_experiments(arguments.only)
    try:
        findings = run(names, work, steps_scale=scale, count=arguments.count, times=arguments.times)
        tables = [distances_table(findings), runs_table(findings, work)]
        write_report(findings, tables, work, report)
    except KeyboardInterrupt:
        parser.exit(130, "interrupted; the same command goes on\n")
    except (MlxCmError, OSError) as error:
        parser.exit(1, f"error: {error}\n")
    print("\n\n".join(table.plain() for table in tables))
    claims = findings.claims()
    for claim, holds in claims.items():
        print(f"{'holds' if holds else 'FAILS'}  {claim}")
    sys.exit(not all(claims.values()))


if __name__ == "__main__":
    main()
