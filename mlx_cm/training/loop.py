"""The loop: gradients of parts of a batch, one update, averages of the weights; and what has to be kept of it all.

The state is arrays and a step number, and a step is a function of both, so that stopping and going on changes nothing.
"""

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from mlx_cm.backend import on_gpu
from mlx_cm.errors import ModelError, UsageError
from mlx_cm.model_folder import DTYPES
from mlx_cm.training.checkpoints import Checkpoint
from mlx_cm.training.objectives import Batch, Objective
from mlx_cm.training.optimizers import OPTIMIZERS, clip_gradients, learning_rate_factor
from mlx_cm.training.processes import arrays_of_first, first_one_says, mean_over_processes
from mlx_cm.training.settings import TrainSettings
from mlx_cm.training.weights import Parameters, Weighted, master_parameters

MOMENTS = ("m", "v")  # what the optimisers keep of each parameter
# float16 holds nothing below 6e-8: losses are scaled up before gradients are taken, by half as much after an overflow.
# What overflows without being scaled up would do so with less as well.
FIRST_LOSS_SCALE, LEAST_LOSS_SCALE = 2.0**15, 1.0
LOSS_SCALE_GROWS_AFTER = 2000  # steps without an overflow


class Batches(Protocol):
    """What the data gives."""

    def load(self, step: int, start: int = 0, stop: int | None = None) -> Batch:
        """Rows [start, stop) of the batch of a step."""


@dataclass(frozen=True)
class StepReport:
    """What a step says of itself."""

    step: int  # steps done, this one among them
    loss: float
    metrics: dict[str, float]
    gradient_norm: float
    learning_rate: float
    skipped: bool = False  # whether the gradients overflowed in float16, so that nothing was changed

    @property
    def is_finite(self) -> bool:
        """Whether training can go on from here."""
        return self.skipped or (math.isfinite(self.loss) and math.isfinite(self.gradient_norm))


class Trainer:
    """The state of a run and its step.

    Args:
        modules: the trained parts; their own trainable weights are where training starts.
        objective: what for.
        batches: what from.
        settings: how.
        group: the processes that share each batch; None: those that MLX knows of, one where nothing else was launched.

    Raises:
        UsageError: a batch that the parts and processes cannot share equally.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        objective: Objective,
        batches: Batches,
        settings: TrainSettings,
        group: mx.distributed.Group | None = None,
    ):
        self.modules, self.objective, self.batches, self.settings = dict(modules), objective, batches, settings
        self.group = group or mx.distributed.init()
        processes = self.group.size()
        parts = settings.accumulate * processes
        if settings.batch_size % parts:
            raise UsageError(
                f"batch_size {settings.batch_size}",
                f"cannot be split equally into {settings.accumulate} parts on each of {processes} processes",
            )
        self.rows = settings.batch_size // parts  # of one part on one process
        self.streams = _streams(settings.parallel, self.rows)
        self.first_row = self.group.rank() * settings.accumulate * self.rows
        self.dtype = DTYPES[settings.dtype]

        self.step = 0
        self.student = master_parameters(self.modules)
        self.target = self.student if objective.target_rate(0) else None
        self.averages = dict.fromkeys(settings.ema, self.student)
        self.optimizer = OPTIMIZERS[settings.optimizer](
            settings.learning_rate, settings.betas, settings.eps, settings.weight_decay
        )
        self.optimizer.init(self.student)
        self.loss_scale = FIRST_LOSS_SCALE if self.dtype == mx.float16 else 1.0
        self.steps_without_overflow = 0
        compiled = on_gpu() if settings.compile is None else settings.compile
        self._gradients: Callable = mx.compile(self._gradients_of) if compiled else self._gradients_of
        self._update: Callable = mx.compile(self._updated) if compiled else self._updated

    # --- a step

    def advance(self) -> StepReport:
        """Makes one step.

        Raises:
            ModelError: a picture cannot be read any more; the state is still that of the step before.
        """
        settings, step = self.settings, self.step
        gradients, loss, metrics = self._summed_gradients(step)
        rate = settings.learning_rate * learning_rate_factor(step, settings.steps, settings.warmup, settings.decay)
        target_rate = self.objective.target_rate(step) if self.target is not None else 0.0
        # An average that weighed the first weights from the start would take 1 / (1 - rate) steps to forget them.
        average_rates = [min(rate_, (1 + step) / (10 + step)) for rate_ in settings.ema]
        averages = list(self.averages.values())
        state = {"student": self.student, "averages": averages, "optimizer": self.optimizer.state}
        if self.target is not None:
            state["target"] = self.target
        numbers = [mx.array(value, dtype=mx.float32) for value in (rate, target_rate, 1 / self.loss_scale)]
        state, norm = self._update(state, gradients, *numbers, mx.array(average_rates, dtype=mx.float32))
        self.student, self.target, self.optimizer.state = state["student"], state.get("target"), state["optimizer"]
        self.averages = dict(zip(self.averages, state["averages"], strict=True))
        del gradients
        self.bind(self.student)  # nothing holds the old arrays now, so the new ones can take their memory
        mx.eval(state, norm, loss, metrics)

        overflowed = self.dtype == mx.float16 and not math.isfinite(norm.item())
        skipped = overflowed and self.loss_scale > LEAST_LOSS_SCALE
        if self.dtype == mx.float16:
            self._adapt_loss_scale(overflowed)
        self.step = step + 1
        return StepReport(
            self.step, loss.item(), {name: value.item() for name, value in metrics.items()}, norm.item(), rate, skipped
        )

    def _summed_gradients(self, step: int) -> tuple[Parameters, mx.array, dict[str, mx.array]]:
        """Mean gradients, loss and metrics of a step's batch, computed part by part on every process."""
        total: Any = None
        draws: Batch = {}
        for part in range(self.settings.accumulate):
            start = self.first_row + part * self.rows
            rows = self.batches.load(step, start, start + self.rows)
            if not draws:
                draws = self.objective.draw(step, self.settings.batch_size, self._row_shape(rows))
            mine = {name: value[start : start + self.rows] for name, value in draws.items()}
            found = self._gradients_at_once({**rows, **mine})
            total = found if total is None else tree_map(mx.add, total, found)
            if self.settings.accumulate > 1:
                mx.eval(total)
        return mean_over_processes(self.group, tree_map(lambda x: x / self.settings.accumulate, total))

    def _gradients_at_once(self, batch: Batch) -> tuple[Parameters, mx.array, dict[str, mx.array]]:
        """Mean gradients, loss and metrics of a part of a batch, shared between the streams."""
        scale, share = mx.array(self.loss_scale), self.rows // len(self.streams)
        found = []
        for number, stream in enumerate(self.streams):
            mine = slice(number * share, (number + 1) * share)
            rows = {name: value[mine] for name, value in batch.items()}
            with mx.stream(stream):
                found.append(self._gradients(self.student, self.target, rows, scale))
        return tree_map(lambda *each: sum(each) / len(each), *found) if len(found) > 1 else found[0]

    @staticmethod
    def _row_shape(rows: Batch) -> tuple[int, ...]:
        """Shape of what is trained on: pictures, or latents."""
        return rows["x0" if "x0" in rows else "mean"].shape[1:]

    def _gradients_of(
        self, student: Parameters, target: Parameters | None, batch: Batch, loss_scale: mx.array
    ) -> tuple[Parameters, mx.array, dict[str, mx.array]]:
        def loss_of(student: Parameters) -> tuple[mx.array, mx.array, dict[str, mx.array]]:
            frozen = tree_map(mx.stop_gradient, student if target is None else target)
            weighted, weighted_target = (Weighted(self.modules, one, self.dtype) for one in (student, frozen))
            loss, metrics = self.objective.loss(weighted, weighted_target, batch)
            return loss * loss_scale, loss, metrics

        (_, loss, metrics), gradients = mx.value_and_grad(loss_of)(student)
        return gradients, loss, metrics

    def _updated(
        self,
        state: dict[str, Any],
        gradients: Parameters,
        rate: mx.array,
        target_rate: mx.array,
        unscale: mx.array,
        average_rates: mx.array,
    ) -> tuple[dict[str, Any], mx.array]:
        """The state after an update, and the norm of the gradients."""
        gradients = tree_map(lambda g: g * unscale, gradients)
        gradients, norm = clip_gradients(gradients, self.settings.clip)
        optimizer = self.optimizer
        kept = tree_map(lambda array: array, state["optimizer"])  # its own dicts, which the optimiser writes into
        optimizer.state = kept | {"learning_rate": rate}
        student = optimizer.apply_gradients(gradients, state["student"])
        averages = [_towards(average, student, average_rates[i]) for i, average in enumerate(state["averages"])]
        made = {"student": student, "averages": averages, "optimizer": optimizer.state}
        if "target" in state:
            made["target"] = _towards(state["target"], student, target_rate)
        if self.dtype == mx.float16:  # overflowing gradients change nothing
            made = tree_map(lambda new, old: mx.where(mx.isfinite(norm), new, old), made, state)
        return made, norm

    def _adapt_loss_scale(self, overflowed: bool) -> None:
        self.steps_without_overflow = 0 if overflowed else self.steps_without_overflow + 1
        if overflowed:
            self.loss_scale = max(self.loss_scale / 2, LEAST_LOSS_SCALE)
        elif self.steps_without_overflow % LOSS_SCALE_GROWS_AFTER == 0:
            self.loss_scale *= 2

    # --- what is kept

    def bind(self, parameters: Parameters, dtype: mx.Dtype = mx.float32) -> None:
        """Gives the modules a set of weights, until the next step."""
        weighted = Weighted(self.modules, parameters, dtype)
        for part in self.modules:
            weighted.part(part)

    def exported(self) -> Parameters:
        """The weights that the model and the samples are made of."""
        chosen = {"student": self.student, "target": self.target or self.student}
        return next(iter(self.averages.values())) if self.settings.export == "ema" else chosen[self.settings.export]

    def checkpoint(self, **told: Any) -> Checkpoint:
        """The state, with what else is to be remembered; JSON's types."""
        groups = {"student": self.student}
        if self.target is not None:
            groups["target"] = self.target
        groups |= {f"ema_{rate}": average for rate, average in self.averages.items()}
        kept = self.optimizer.state
        for moment in MOMENTS:
            groups[moment] = {
                part: {name: kept[part][name][moment] for name in self.student[part]} for part in self.student
            }
        arrays = {group: _joined(parameters) for group, parameters in groups.items()}
        own = {"optimizer_steps": kept["step"].item()}
        if self.dtype == mx.float16:
            own |= {"loss_scale": self.loss_scale, "steps_without_overflow": self.steps_without_overflow}
        return Checkpoint(self.step, arrays, own | told)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Goes on from a checkpoint.

        Raises:
            ModelError: it is of other networks, or of other settings of averages and target.
        """
        wanted = self.checkpoint().arrays
        for group, arrays in wanted.items():
            found = checkpoint.arrays.get(group)
            if found is None or {name: x.shape for name, x in found.items()} != {n: x.shape for n, x in arrays.items()}:
                raise ModelError(
                    f"checkpoint of step {checkpoint.step}",
                    f"has not the {group!r} weights that these settings ask for",
                    "leave the settings of model, lora, ema and target as they were",
                )
        groups = {group: self._split(checkpoint.arrays[group]) for group in wanted}
        self.student = groups["student"]
        self.target = groups["target"] if self.target is not None else None
        self.averages = {rate: groups[f"ema_{rate}"] for rate in self.averages}
        moments = {
            part: {name: {moment: groups[moment][part][name] for moment in MOMENTS} for name in parameters}
            for part, parameters in self.student.items()
        }
        step = mx.array(checkpoint.state["optimizer_steps"], dtype=mx.uint64)
        self.optimizer.state = moments | {"step": step, "learning_rate": mx.array(0.0)}
        self.step = checkpoint.step
        if self.dtype == mx.float16:
            self.loss_scale = checkpoint.state.get("loss_scale", FIRST_LOSS_SCALE)
            self.steps_without_overflow = checkpoint.state.get("steps_without_overflow", 0)

    def share(self) -> None:
        """Gives all processes the state of the first."""
        own = self.checkpoint()
        arrays = {group: arrays_of_first(self.group, arrays) for group, arrays in own.arrays.items()}
        told = first_one_says(self.group, lambda: {"step": own.step, "state": own.state})
        self.restore(Checkpoint(told["step"], arrays, told["state"]))

    def _split(self, arrays: Mapping[str, mx.array]) -> Parameters:
        """The inverse of `_joined`."""
        return {part: {name: arrays[f"{part}.{name}"] for name in names} for part, names in self.student.items()}


def _streams(wanted: int, rows: int) -> list[mx.Stream]:
    """Streams to compute parts of a batch on at once, as many as share its rows equally.

    Of MLX's CPU operations only matrix products use more than one core, so on a CPU there is a stream for each core.
    """
    wanted = wanted or (1 if on_gpu() else os.cpu_count() or 1)
    count = next(count for count in range(min(wanted, rows), 0, -1) if rows % count == 0)
    device = mx.default_device()
    return [mx.default_stream(device), *(mx.new_stream(device) for _ in range(count - 1))]


def _joined(parameters: Parameters) -> dict[str, mx.array]:
    """All parts in one: "unet.conv_in.weight" => array."""
    return {f"{part}.{name}": value for part, values in parameters.items() for name, value in values.items()}


def _towards(average: Parameters, current: Parameters, rate: mx.array) -> Parameters:
    """rate * average + (1 - rate) * current: an exponential moving average."""
    return tree_map(lambda old, new: rate * old + (1 - rate) * new, average, current)
