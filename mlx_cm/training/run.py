"""A run: a folder with settings, log, samples and checkpoints, which ends in a model folder.

RUN/config.toml             every setting; starts the same run again with --config
RUN/run.json                the method, and where data and model were
RUN/log.csv, loss.png       a row each `log_every` steps, and the curve
RUN/samples/                the same noise every `sample_every` steps
RUN/checkpoints/            what --resume goes on from
RUN/model/, RUN/lora/       the result
"""

import contextlib
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

import mlx_cm
from mlx_cm.errors import DiskError, ModelError, OutputError, UsageError
from mlx_cm.images import contact_sheet, save_image, to_pil
from mlx_cm.storage import atomic_file, read_json, write_json
from mlx_cm.training.assembly import make_batches, make_objective
from mlx_cm.training.checkpoints import newest_checkpoint, save_checkpoint
from mlx_cm.training.curve import draw_curve
from mlx_cm.training.data import PictureData, Progress, open_data
from mlx_cm.training.log import TrainingLog
from mlx_cm.training.loop import StepReport, Trainer
from mlx_cm.training.methods import AUTOENCODER, LATENT
from mlx_cm.training.models import Trainee, build_trainee, measure_scaling, write_adapter, write_model
from mlx_cm.training.recomputation import recompute_blocks
from mlx_cm.training.settings import Settings, changed_settings, read_settings, settings_to_dict, to_toml
from mlx_cm.training.weights import Weighted

log = logging.getLogger("mlx_cm")

CONFIG, STARTED, LOG, CURVE = "config.toml", "run.json", "log.csv", "loss.png"
CHECKPOINTS, SAMPLES, MODEL, LORA = "checkpoints", "samples", "model", "lora"
MEASURED_BATCHES = 32  # that the scale of an autoencoder's latents is taken from
SIGNALS = (signal.SIGINT, signal.SIGTERM)

OnStep = Callable[[StepReport, int, float], None]  # (report, steps in all, pictures per second)


@dataclass(frozen=True)
class Result:
    """How a run ended."""

    folder: Path
    step: int  # steps done
    model: Path | None  # the result; None where the run was stopped before its end
    stopped_by: int | None = None  # number of the signal
    skipped: tuple[str, ...] = ()  # pictures that could not be used


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

    SIGINT and SIGTERM are waited for: the step under way is finished and a checkpoint written. With several processes
    (`mlx.launch`) each batch is shared, and the first process writes.

    Args:
        method: of `mlx_cm.training.methods.METHODS`.
        output: the run folder.
        data: a folder of pictures, an `.npz` file, tar shards; see `open_data`. A resumed run knows it.
        model: what to start from or to distil; a reference as for `mlx_cm.load`. A resumed run knows it.
        config: a TOML file or the name of a shipped recipe. A resumed run has its own.
        overrides: "section.name" => value.
        resume: go on with a run that exists.
        strict_data: whether a picture that cannot be used is an error.
        progress: told of the pictures that are opened and encoded.
        on_step: called after each step, on the first process.

    Raises:
        UsageError: settings, data and model do not fit together.
        ModelError: data or model cannot be read, or there is nothing to resume.
        DiskError: the run folder exists already, or there is no space.
        OutputError: the loss is not finite any more; names the newest checkpoint.
    """
    folder = Path(output).expanduser()
    group = mx.distributed.init()
    is_first = group.rank() == 0
    started = _started(folder, method, data, model, resume)
    config = folder / CONFIG if resume else config
    settings = read_settings(method, config=config, overrides=overrides or {})
    if resume:
        _tell_changes(read_settings(method, config=folder / CONFIG), settings)

    opened = open_data(
        Path(started["data"]).expanduser(), strict=strict_data, workers=settings.data.workers, progress=progress
    )
    trainee = build_trainee(settings, started["model"], num_classes=opened.num_classes, progress=progress)
    if settings.train.recompute:
        for module in trainee.modules.values():
            recompute_blocks(module)
    batches = _one_after_the_other(group, lambda: make_batches(settings, trainee, opened, progress))
    objective = make_objective(settings, trainee, batches)
    trainer = Trainer(trainee.modules, objective, batches, settings.train, group)
    checkpoint = newest_checkpoint(folder / CHECKPOINTS) if resume else None
    if checkpoint is not None:
        trainer.restore(checkpoint)
    if is_first:
        write_text(folder / CONFIG, to_toml(settings_to_dict(settings)))
        write_json_atomically(folder / STARTED, started)
    run = Run(folder, settings, trainer, trainee, opened, group, on_step, checkpoint.state if checkpoint else {})
    return run.go()


class Run:
    """One run under way."""

    def __init__(
        self,
        folder: Path,
        settings: Settings,
        trainer: Trainer,
        trainee: Trainee,
        data: PictureData,
        group: mx.distributed.Group,
        on_step: OnStep | None,
        state: Mapping[str, Any],
    ):
        self.folder, self.settings, self.trainer, self.trainee, self.data = folder, settings, trainer, trainee, data
        self.group, self.is_first = group, group.rank() == 0
        self.on_step = on_step if self.is_first else None
        self.log = TrainingLog(folder / LOG, trainer.step, state.get("window", {})) if self.is_first else None
        self.saved = trainer.step if state else None  # step of the newest checkpoint

    def go(self) -> Result:
        """Trains to the end, or until a signal."""
        chosen, trainer = self.settings.train, self.trainer
        with stop_signals() as received:
            while trainer.step < chosen.steps:
                began = time.perf_counter()
                report = trainer.advance()
                speed = chosen.batch_size / (time.perf_counter() - began)
                self._check(report)
                self._note(report, speed)
                stop = self._agreed(received[0] if received else 0)
                is_last = trainer.step == chosen.steps
                if stop or is_last or _due(trainer.step, chosen.checkpoint_every):
                    self._save()
                if is_last or _due(trainer.step, chosen.sample_every):
                    self._sample()
                if stop and not is_last:
                    return Result(self.folder, trainer.step, None, stop, tuple(self.data.skipped))
        return Result(self.folder, trainer.step, self._export(), None, tuple(self.data.skipped))

    def _agreed(self, received: int) -> int:
        """The signal that any of the processes got, so that all stop at the same step."""
        if self.group.size() == 1:
            return received
        return int(mx.distributed.all_max(mx.array(received), group=self.group).item())

    def _check(self, report: StepReport) -> None:
        if report.is_finite:
            return
        last = f"the checkpoint of step {self.saved}" if self.saved is not None else "no checkpoint yet"
        raise OutputError(
            f"step {report.step}",
            f"the loss is {report.loss}, its gradient's norm {report.gradient_norm}; the last good state is {last}",
            "lower train.learning_rate, or compute in float32, and --resume",
        )

    def _note(self, report: StepReport, speed: float) -> None:
        if self.log is None:
            return
        described = self.trainer.objective.describe(report.step - 1)
        self.log.add(report, described, speed)
        if _due(report.step, self.settings.train.log_every) or report.step == self.settings.train.steps:
            self.log.write_row()
        if self.on_step:
            self.on_step(report, self.settings.train.steps, speed)

    def _save(self) -> None:
        if self.is_first and self.saved != self.trainer.step:
            told = {"window": self.log.window, "skipped": list(self.data.skipped)}
            save_checkpoint(self.folder / CHECKPOINTS, self.trainer.checkpoint(**told), self.settings.train.keep)
            draw_curve(self.folder / LOG, self.folder / CURVE)
        self.saved = self.trainer.step

    def _bound(self) -> None:
        """Gives the modules the weights that are exported."""
        weighted = Weighted(self.trainee.modules, self.trainer.exported(), self.trainer.dtype)
        for part in self.trainee.modules:
            weighted.part(part)

    def _sample(self) -> None:
        """Writes pictures of the same noise, a file for each number of steps."""
        if not self.is_first or not self.settings.samples.steps:
            return
        self._bound()
        for name, pictures in self._pictures():
            path = self.folder / SAMPLES / f"step_{self.trainer.step:08}{name}.png"
            save_image(contact_sheet(pictures), path)

    def _pictures(self) -> Iterator[tuple[str, list]]:
        chosen, trainee = self.settings.samples, self.trainee
        if trainee.space == AUTOENCODER:
            rows = self.trainer.batches.load(0, 0, min(chosen.count, self.settings.train.batch_size))["x0"]
            vae = trainee.modules["vae"]
            decoded = mx.clip(vae.decode(vae.encode(rows)[0]), -1, 1)
            yield "", [picture for pair in zip(to_pil(rows), to_pil(decoded), strict=True) for picture in pair]
            return
        for steps in chosen.steps:
            yield f"_{steps}", list(self._generated(steps))

    def _generated(self, steps: int) -> list:
        """Pictures as `generate` makes them, blank ones too: early in a run they are."""
        chosen, pipeline = self.settings.samples, self.trainee.pipeline
        seeds = [chosen.seed + k for k in range(chosen.count)]
        if self.trainee.space != LATENT:
            return to_pil(mx.clip(pipeline.sample(pipeline.resolve(seed=seeds, steps=steps)), -1, 1))
        captions = list(dict.fromkeys(caption or "" for caption in self.data.captions))
        prompts = list(chosen.prompts) or captions[:: max(1, len(captions) // chosen.count)]
        made = []
        for prompt, seed in zip(prompts * len(seeds), seeds, strict=False):
            request = pipeline.resolve(prompt, seed=seed, steps=steps, guidance_scale=chosen.guidance_scale)
            made += to_pil(mx.clip(pipeline.decode(pipeline.sample(request)), -1, 1))
        return made

    def _export(self) -> Path | None:
        """Writes the result; the first process does."""
        if not self.is_first:
            return None
        self._bound()
        told = {"method": self.settings.method, "steps": self.trainer.step, "seed": self.settings.train.seed}
        if self.trainee.space == AUTOENCODER:
            batches = min(self.trainer.step, MEASURED_BATCHES)
            measure_scaling(self.trainee.modules["vae"], (self.trainer.batches.load(k)["x0"] for k in range(batches)))
        if self.trainee.has_lora:
            return write_adapter(self.folder / LORA, self.trainee, told)
        return write_model(self.folder / MODEL, self.trainee, told)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _started(
    folder: Path, method: str, data: str | Path | None, model: str | Path | None, resume: bool
) -> dict[str, Any]:
    """What a run was started with: as given, or as a run that is resumed remembers it."""
    if not resume:
        if folder.exists() and any(folder.iterdir()):
            raise DiskError(str(folder), "exists already", "pass --resume to go on, or choose another name")
        if data is None:
            raise UsageError("data", "none given", "--data DIR")
        return {"method": method, "data": str(data), "model": None if model is None else str(model),
                "program": f"mlx-cm {mlx_cm.__version__}"}  # fmt: skip
    if not (folder / STARTED).is_file():
        raise ModelError(str(folder), "holds no run to resume", "leave --resume out to start one")
    started = read_json(folder / STARTED)
    if started.get("method") != method:
        raise UsageError("method", f"{folder} is a run of {started.get('method')!r}, not of {method!r}")
    given = {name: str(value) for name, value in (("data", data), ("model", model)) if value is not None}
    return started | given


def _tell_changes(before: Settings, after: Settings) -> None:
    changed = changed_settings(before, after)
    if changed:
        log.warning("the run goes on with other settings than it had: %s", ", ".join(changed))


def _one_after_the_other(group: mx.distributed.Group, make: Callable[[], Any]) -> Any:
    """Lets the first process make something before the others do: what it puts into the cache is there for them."""
    made = make() if group.rank() == 0 else None
    if group.size() > 1:
        mx.eval(mx.distributed.all_sum(mx.array(1), group=group))  # they wait here
    return make() if made is None else made


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM in a list instead of letting them break in; a second one does break in.

    Outside the main thread, which alone gets signals, the list stays empty.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    previous = {number: signal.getsignal(number) for number in SIGNALS}

    def note(number: int, frame: Any) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)
        log.warning("stopping after this step; again to stop at once, without a checkpoint")

    for number in SIGNALS:
        signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def write_text(path: Path, text: str) -> None:
    """Writes a text file whole or not at all."""
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json_atomically(path: Path, value: Mapping[str, Any]) -> None:
    """Writes a JSON file whole or not at all."""
    with atomic_file(path) as partial:
        write_json(partial, value)
