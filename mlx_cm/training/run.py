"""A run: training from the beginning or from a checkpoint, with log, samples and checkpoints, to a model folder."""

import contextlib
import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_cm.errors import ModelError, OutputError, UsageError
from mlx_cm.images import contact_sheet, save_image
from mlx_cm.training.assembly import make_batches, make_objective
from mlx_cm.training.checkpoints import checkpoint_name, newest_checkpoint, save_checkpoint
from mlx_cm.training.curve import draw_curve
from mlx_cm.training.data import PictureData, Progress, open_data
from mlx_cm.training.log import TrainingLog
from mlx_cm.training.loop import StepReport, Trainer
from mlx_cm.training.methods import AUTOENCODER
from mlx_cm.training.models import Trainee, build_trainee, measure_scaling, write_adapter, write_model
from mlx_cm.training.previews import preview_sheets
from mlx_cm.training.processes import any_of, first_one_first, first_one_says, launched_processes, lost_connections
from mlx_cm.training.recomputation import recompute_blocks
from mlx_cm.training.run_folder import (
    CHECKPOINTS,
    CURVE,
    LOG,
    LORA,
    MODEL,
    SAMPLES,
    beginning,
    reserved,
    resume_command,
    write_beginning,
)
from mlx_cm.training.settings import Settings, settings_from_dict
from mlx_cm.training.stopping import stop_signals

log = logging.getLogger("mlx_cm")

MEASURED_BATCHES = 32  # that the scale of an autoencoder's latents is taken from
# What a run depends on beside its settings, and what to say where that is not as it was.
CIRCUMSTANCES = {
    "data": "the pictures, their captions or labels",
    "model": "the model it started from",
    "processes": "how many processes share a batch",
    "streams": "how many parts of a batch are computed at once",
    "mlx": "the version of MLX",
}

OnStep = Callable[[StepReport, int, float], None]  # (report, steps in all, pictures per second)


@dataclass(frozen=True)
class Result:
    """How a run ended."""

    folder: Path
    step: int  # steps done
    model: Path | None  # the result; None where the run was stopped before its end
    stopped_by: int = 0  # number of the signal; 0: none
    skipped: tuple[str, ...] = ()  # pictures that could not be used
    is_first: bool = True  # whether this process is the one that writes


def train(
    method: str,
    output: str | Path,
    *,
    data: str | Path | None = None,
    model: str | Path | None = None,
    config: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    resume: bool = False,
    strict_data: bool = False,
    progress: Progress | None = None,
    on_step: OnStep | None = None,
) -> Result:
    """Trains, from the beginning or from the newest checkpoint.

    SIGINT, SIGTERM and SIGHUP are waited for: the step under way is finished and a checkpoint written; a second one
    ends the process at once. With several processes (`mlx.launch`) each batch is shared, and the first process writes.

    Args:
        method: of `mlx_cm.training.methods.METHODS`.
        output: the run folder; see `mlx_cm.training.run_folder`.
        data: a folder of pictures, an `.npz` file, tar shards; see `open_data`. A resumed run knows it.
        model: what to start from or to distil; a reference as for `mlx_cm.load`. A resumed run knows it.
        config: a TOML file or the name of a shipped recipe. A resumed run has its own.
        overrides: "section.name" => value; None: as by default.
        resume: go on with a run that exists.
        strict_data: whether a picture that cannot be used is an error.
        progress: told of the pictures that are opened and encoded.
        on_step: called after each step, on the first process.

    Raises:
        UsageError: settings, data and model do not fit together.
        ModelError: data or model cannot be read, or there is nothing to resume.
        DiskError: the run folder exists already or is in use, or there is no space.
        NetworkError: another process of the run is gone.
        OutputError: the numbers are not finite any more; names the newest checkpoint.
    """
    folder = Path(output).expanduser()
    group = launched_processes()
    is_first = group.rank() == 0
    with contextlib.ExitStack() as stack:
        stack.enter_context(lost_connections(group))

        def begin() -> dict[str, Any]:
            stack.enter_context(reserved(folder))
            return beginning(
                folder, method, data=data, model=model, config=config, overrides=overrides or {}, resume=resume
            )

        told = first_one_says(group, begin)
        started, settings = told["started"], settings_from_dict(method, told["settings"], str(folder))
        progress = progress if is_first else None
        # What is given is found on every machine; what is remembered, where the first process found it.
        path, model = Path(data or started["data"]).expanduser(), model or started["model"]
        opened = open_data(path, strict=strict_data, workers=settings.data.workers, progress=progress)
        trainee = build_trainee(settings, model, num_classes=opened.num_classes, progress=progress)
        if settings.train.recompute:
            for module in trainee.modules.values():
                recompute_blocks(module)
        batches = first_one_first(group, lambda: make_batches(settings, trainee, opened, progress))
        objective = make_objective(settings, trainee, batches)
        trainer = Trainer(trainee.modules, objective, batches, settings.train, group)
        run = Run(folder, settings, trainer, trainee, opened, on_step)
        if resume:
            run.restore()
        if is_first:
            write_beginning(folder, told)
        return run.go()


class Run:
    """One run under way.

    Raises:
        UsageError: samples that the model cannot make, or pictures that are not those of the first process.
    """

    def __init__(
        self,
        folder: Path,
        settings: Settings,
        trainer: Trainer,
        trainee: Trainee,
        data: PictureData,
        on_step: OnStep | None = None,
    ):
        self.folder, self.settings, self.trainer, self.trainee, self.data = folder, settings, trainer, trainee, data
        self.is_first = trainer.group.rank() == 0
        self.on_step = on_step if self.is_first else None
        sheets = preview_sheets(settings, trainee, data, trainer.batches)
        self.sheets = sheets if self.is_first else {}
        if not self.sheets:
            trainee.release_encoders()
        self.saved: int | None = None  # step of the newest checkpoint
        self.log: TrainingLog | None = None  # of the first process
        self.window: dict[str, list[float]] = {}  # of a log that goes on
        pictures = [(entry.name, entry.label, entry.caption) for entry in data.entries]
        self.circumstances = {
            "data": _digest([pictures, data.sizes]),
            "model": _digest(trainee.base),
            "processes": trainer.group.size(),
            "streams": len(trainer.streams),
            "mlx": mx.__version__,
        }
        if first_one_says(trainer.group, lambda: self.circumstances["data"]) != self.circumstances["data"]:
            raise UsageError(str(data.path), "holds other pictures here than where the first process runs")

    def restore(self) -> None:
        """Goes on from the newest checkpoint; from the beginning where the run was stopped before the first.

        Raises:
            ModelError: all checkpoints are damaged, or the newest is of other networks.
        """
        self.saved = first_one_says(self.trainer.group, self._restored)

    def _restored(self) -> int | None:
        """The step of the newest checkpoint, which the first process goes on from."""
        checkpoint = newest_checkpoint(self.folder / CHECKPOINTS)
        if checkpoint is None:
            return None
        self.trainer.restore(checkpoint)
        self.window = checkpoint.state["window"]
        then = self.circumstances | checkpoint.state.get("circumstances", {})
        changed = [what for name, what in CIRCUMSTANCES.items() if then[name] != self.circumstances[name]]
        if changed:
            log.warning("the run does not go on exactly as it would have; changed: %s", "; ".join(changed))
        return checkpoint.step

    def go(self) -> Result:
        """Trains to the end, or until a signal."""
        chosen, trainer = self.settings.train, self.trainer
        if trainer.group.size() > 1:
            trainer.share()
        if self.is_first:
            self.log = TrainingLog(self.folder / LOG, trainer.step, self.window)
        if trainer.step:
            self._sample()  # it may have been killed before it came to that
        stopped_by = 0
        with stop_signals() as request:
            while trainer.step < chosen.steps and not stopped_by:
                began = time.perf_counter()
                report = self._advance()
                speed = chosen.batch_size / (time.perf_counter() - began)
                self._note(report, speed)
                stopped_by = any_of(trainer.group, request.signal)
                if stopped_by or self._is_due(chosen.checkpoint_every):
                    self._save()
                    any_of(trainer.group, 0)  # none ends, and ends the others, before the first has written
                if self.on_step:
                    self.on_step(report, chosen.steps, speed)
                self._sample()
        told = {"skipped": tuple(self.data.skipped), "is_first": self.is_first}
        if trainer.step < chosen.steps:
            return Result(self.folder, trainer.step, None, stopped_by, **told)
        return Result(self.folder, trainer.step, self._export() if self.is_first else None, **told)

    def _is_due(self, every: int) -> bool:
        """Whether something that is done every so many steps, 0: at the end, is due now."""
        step = self.trainer.step
        return step == self.settings.train.steps or (every > 0 and step % every == 0)

    def _advance(self) -> StepReport:
        try:
            report = self.trainer.advance()
        except ModelError:  # pictures that cannot be read any more cost none of the steps that were made
            self._save()
            raise
        if not report.is_finite:
            raise self._spoilt(f"the loss is {report.loss}, the norm of its gradient {report.gradient_norm}")
        return report

    def _spoilt(self, why: str) -> OutputError:
        good = "there is no checkpoint yet"
        hint = "lower train.learning_rate"
        if self.saved is not None:
            good = f"the last good checkpoint is {self.folder / CHECKPOINTS / checkpoint_name(self.saved)}"
            lower = f"train.learning_rate={self.settings.train.learning_rate / 2:g}"
            hint = resume_command(self.folder, self.settings.method, "--set", lower)
        return OutputError(f"step {self.trainer.step}", f"{why}; {good}", hint)

    def _note(self, report: StepReport, speed: float) -> None:
        if self.log is None:
            return
        self.log.add(report, self.trainer.objective.describe(report.step - 1), speed)
        if self._is_due(self.settings.train.log_every):
            self.log.write_row()

    def _save(self) -> None:
        """Writes a checkpoint, unless there is one of this step, or its numbers are not finite."""
        if self.saved == self.trainer.step:
            return
        window = self.log.window if self.log else {}
        checkpoint = self.trainer.checkpoint(window=window, circumstances=self.circumstances)
        if not checkpoint.is_finite():
            raise self._spoilt("the weights, or what the optimiser keeps, are not finite")
        if self.is_first:
            self.log.flush()
            save_checkpoint(self.folder / CHECKPOINTS, checkpoint, self.settings.train.keep)
            draw_curve(self.folder / LOG, self.folder / CURVE)
        self.saved = self.trainer.step

    def _sample(self) -> None:
        """Makes the pictures that are due and not there."""
        if not self._is_due(self.settings.train.sample_every):
            return
        for name, sheet in self.sheets.items():
            path = self.folder / SAMPLES / f"step_{self.trainer.step:08}{name}.png"
            if not path.exists():
                self.trainer.bind(self.trainer.exported(), self.trainer.dtype)
                save_image(contact_sheet(sheet()), path)

    def _export(self) -> Path:
        """Writes the result, in float32 as it was trained."""
        self.trainer.bind(self.trainer.exported())
        told = {"method": self.settings.method, "steps": self.trainer.step, "seed": self.settings.train.seed}
        if self.trainee.space == AUTOENCODER:
            batches = min(self.trainer.step, MEASURED_BATCHES)
            measure_scaling(self.trainee.modules["vae"], (self.trainer.batches.load(k)["x0"] for k in range(batches)))
        if self.trainee.has_lora:
            return write_adapter(self.folder / LORA, self.trainee, told)
        return write_model(self.folder / MODEL, self.trainee, told)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
