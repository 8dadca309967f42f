"""The loop: resuming is exact at every step, and every setting does what it says."""

import dataclasses
import itertools
import math

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from tiny_training import (
    SIDE,
    PixelRows,
    checkpoint_bits,
    difference,
    latent_trainer,
    perturbed,
    pixel_settings,
    pixel_teacher,
    pixel_trainer,
    state_of,
)

from mlx_cm.errors import ModelError, UsageError
from mlx_cm.models.layers import ResnetBlock2D
from mlx_cm.training.assembly import make_objective
from mlx_cm.training.checkpoints import load_checkpoint, save_checkpoint
from mlx_cm.training.loop import FIRST_LOSS_SCALE, Trainer
from mlx_cm.training.models import Trainee, build_trainee
from mlx_cm.training.optimizers import learning_rate_factor
from mlx_cm.training.recomputation import recompute_blocks

STEPS = 4


def distilling(**train) -> Trainer:
    """A trainer of `cd`."""
    settings = pixel_settings("cd", **train)
    new = build_trainee(pixel_settings("ct"), None, num_classes=3)
    perturbed(new.modules["unet"])
    trainee = Trainee(new.space, new.modules, new.pipeline, pixel_teacher().backbone)
    return Trainer(trainee.modules, make_objective(settings, trainee, PixelRows()), PixelRows(), settings.train)


SHORT = {"steps": STEPS, "batch_size": 4, "ema": [0.9, 0.99], "learning_rate": 1e-2}
TRAINERS = {
    # The curriculum goes on between steps: test_a_curriculum_goes_on.
    "ct": lambda: pixel_trainer("ct", accumulate=2, **SHORT),
    "cd": lambda: distilling(**SHORT),
    "ctm": lambda: pixel_trainer("ctm", **SHORT),
    "teacher": lambda: pixel_trainer("teacher", optimizer="adamw", weight_decay=0.1, warmup=3, decay="cosine", **SHORT),
    "lcd": lambda: latent_trainer(**SHORT | {"ema": (0.9, 0.99)}),
}


# --- resuming


@pytest.mark.parametrize("kind", TRAINERS)
def test_going_on_from_any_step_changes_nothing(tmp_path, kind):
    trainer = TRAINERS[kind]()
    states, reports = [state_of(trainer)], []
    for _ in range(STEPS):
        save_checkpoint(tmp_path, trainer.checkpoint(), keep=STEPS)
        reports.append(trainer.advance())
        states.append(state_of(trainer))
    assert all(one["student.unet.conv_in.weight"] != other["student.unet.conv_in.weight"]
               for one, other in itertools.pairwise(states))  # fmt: skip
    for step in range(STEPS):  # one step from each; what follows from equal states is the test of the next one
        resumed = TRAINERS[kind]()
        resumed.restore(load_checkpoint(tmp_path / f"step_{step:08}"))
        assert state_of(resumed) == states[step]
        assert resumed.advance() == reports[step]
        assert state_of(resumed) == states[step + 1]


def test_a_resumed_trainer_goes_on_to_the_same_end(tmp_path):
    trainer = TRAINERS["ct"]()
    for step in range(STEPS):
        if step == 2:
            save_checkpoint(tmp_path, trainer.checkpoint(), keep=1)
        trainer.advance()
    resumed = TRAINERS["ct"]()
    resumed.restore(load_checkpoint(tmp_path / "step_00000002"))
    for _ in range(STEPS - 2):
        resumed.advance()
    assert state_of(resumed) == state_of(trainer)


def test_a_curriculum_goes_on_between_the_steps_that_are_resumed():
    described = [TRAINERS["ct"]().objective.describe(step) for step in range(STEPS)]
    assert len({stage["num_scales"] for stage in described}) == STEPS
    assert len({stage["target_rate"] for stage in described}) == STEPS


@pytest.mark.parametrize(
    "other", [{"ema": [0.5]}, {"overrides": {"model.unet.block_out_channels": [8]}}], ids=["average", "network"]
)
def test_a_checkpoint_of_other_weights_is_refused(other):
    checkpoint = pixel_trainer("ct", **SHORT).checkpoint()
    with pytest.raises(ModelError, match=r"checkpoint of step 0: has not the '(ema_0.5|student)' weights"):
        pixel_trainer("ct", **SHORT | other).restore(checkpoint)


def test_an_average_can_be_given_up():
    checkpoint = pixel_trainer("ct", **SHORT).checkpoint()
    trainer = pixel_trainer("ct", **SHORT | {"ema": [0.99]})
    trainer.restore(checkpoint)
    assert list(trainer.averages) == [0.99]


# --- sharing a batch


@pytest.mark.parametrize("method", ["ct", "teacher"])
def test_neither_accumulation_nor_streams_change_a_step(method):
    # Dropout masks are drawn for the whole batch too.
    trainers = [pixel_trainer(method, batch_size=4, steps=2, accumulate=parts, parallel=streams)
                for parts, streams in [(1, 1), (4, 1), (1, 2), (2, 2)]]  # fmt: skip
    assert [len(trainer.streams) for trainer in trainers] == [1, 1, 2, 2]
    first, *others = [(trainer.advance(), trainer) for trainer in trainers]
    assert first[0].gradient_norm > 1e-3
    for report, trainer in others:
        assert report.loss == pytest.approx(first[0].loss, rel=1e-5)
        assert report.gradient_norm == pytest.approx(first[0].gradient_norm, rel=1e-5)
        assert difference(moments(trainer, "m"), moments(first[1], "m")) < 1e-5
        assert difference(trainer.student, first[1].student) < 1e-6


def moments(trainer: Trainer, name: str) -> dict:
    return {
        part: {key: trainer.optimizer.state[part][key][name] for key in values}
        for part, values in trainer.student.items()
    }


def test_a_batch_that_cannot_be_shared_equally_is_refused():
    settings = dataclasses.replace(pixel_settings("ct").train, batch_size=5)
    trainer = pixel_trainer("ct", batch_size=4)
    with pytest.raises(UsageError, match=r"batch_size 5: cannot be split equally into 2 parts on each of 3 processes"):
        Trainer(trainer.modules, trainer.objective, PixelRows(), doubled(settings), ThreeProcesses())


def doubled(settings):
    """Settings of two parts, which they themselves would refuse for this batch."""
    object.__setattr__(settings, "accumulate", 2)
    return settings


class ThreeProcesses:
    def size(self) -> int:
        return 3

    def rank(self) -> int:
        return 2


def test_each_process_takes_its_own_rows():
    asked = []

    class Asked(PixelRows):
        def load(self, step, start=0, stop=None):
            asked.append((step, start, stop))
            raise ModelError("rows", "are not needed")

    trainer = pixel_trainer("ct", batch_size=12, accumulate=2)
    third = Trainer(trainer.modules, trainer.objective, Asked(), trainer.settings, ThreeProcesses())
    with pytest.raises(ModelError):
        third.advance()
    assert asked == [(0, 8, 10)]


# --- the update


def test_a_compiled_step_is_the_same_step():
    eager, compiled = (pixel_trainer("ct", batch_size=2, steps=3, parallel=1, compile=on) for on in (False, True))
    for _ in range(2):
        one, other = eager.advance(), compiled.advance()
        assert other.loss == pytest.approx(one.loss, rel=1e-4)
        assert difference(compiled.student, eager.student) < 1e-6
        assert difference(compiled.target, eager.target) < 1e-6


def test_averages_and_target_follow_at_their_rates():
    trainer = pixel_trainer("ct", overrides={"objective.target_rate": 0.5}, **SHORT)
    name = "conv_in.weight"
    averages = {rate: np.array(trainer.student["unet"][name], np.float64) for rate in (0.9, 0.99)}
    target = averages[0.9]
    for step in range(4):
        mu = trainer.objective.target_rate(step)
        assert 0 < mu < 1
        trainer.advance()
        student = np.array(trainer.student["unet"][name], np.float64)
        target = mu * target + (1 - mu) * student
        np.testing.assert_allclose(np.array(trainer.target["unet"][name]), target, rtol=0, atol=1e-7)
        for rate in averages:
            reached = min(rate, (1 + step) / (10 + step))
            averages[rate] = reached * averages[rate] + (1 - reached) * student
            np.testing.assert_allclose(np.array(trainer.averages[rate]["unet"][name]), averages[rate], atol=1e-7)
    assert np.abs(target - student).max() > 1e-5


def test_an_average_reaches_its_rate():
    trainer = pixel_trainer("teacher", batch_size=2, ema=[0.5, 0.99], steps=10)
    trainer.step = 9  # min(0.5, 10 / 19)
    before = np.array(trainer.student["unet"]["conv_in.bias"], np.float64)
    trainer.advance()
    student = np.array(trainer.student["unet"]["conv_in.bias"], np.float64)
    averages = {rate: np.array(trainer.averages[rate]["unet"]["conv_in.bias"]) for rate in (0.5, 0.99)}
    np.testing.assert_allclose(averages[0.5], (before + student) / 2, atol=1e-7)
    np.testing.assert_allclose(averages[0.99], (10 * before + 9 * student) / 19, atol=1e-7)


def test_what_is_exported():
    trainer = pixel_trainer("ct", **SHORT)
    trainer.advance()
    chosen = {"ema": trainer.averages[0.9], "target": trainer.target, "student": trainer.student}
    for export, weights in chosen.items():
        trainer.settings = dataclasses.replace(trainer.settings, export=export)
        assert trainer.exported() is weights
    teacher = pixel_trainer("teacher", export="target", **SHORT)
    assert teacher.target is None
    assert teacher.exported() is teacher.student


@pytest.mark.parametrize("decay", ["constant", "linear", "cosine"])
def test_the_learning_rate_is_what_an_update_is_made_with(decay):
    # Without its divisor Adam's first step is the gradient times rate / (1 - beta1) * (1 - beta1).
    trainer = pixel_trainer(
        "teacher", optimizer="adam", eps=1e6, learning_rate=0.5, warmup=2, decay=decay, steps=6, batch_size=2, clip=0
    )
    for step in range(4):
        trainer.step = step
        trainer.optimizer.init(trainer.student)
        trainer.optimizer.state = fresh(trainer)
        before = trainer.student["unet"]["conv_out.weight"]
        report = trainer.advance()
        moved = before - trainer.student["unet"]["conv_out.weight"]
        expected = report.learning_rate * 10 * moments(trainer, "m")["unet"]["conv_out.weight"] / 1e6
        assert report.learning_rate == pytest.approx(0.5 * learning_rate_factor(step, 6, 2, decay))
        assert float(mx.abs(moved).max()) > 0
        np.testing.assert_allclose(np.array(moved), np.array(expected), rtol=0.02, atol=6e-8)


def fresh(trainer: Trainer) -> dict:
    """The optimiser's state before its first step."""
    zeros = {
        part: {name: {"m": mx.zeros_like(value), "v": mx.zeros_like(value)} for name, value in values.items()}
        for part, values in trainer.student.items()
    }
    return zeros | {"step": mx.array(0, mx.uint64), "learning_rate": mx.array(0.0)}


def test_gradients_are_clipped_all_together():
    free, clipped = (pixel_trainer("teacher", batch_size=2, clip=clip) for clip in (0.0, 0.01))
    norms = [trainer.advance().gradient_norm for trainer in (free, clipped)]
    assert norms[0] == pytest.approx(norms[1])  # the log has what it was before
    assert norms[0] > 0.1
    kept = moments(clipped, "m")["unet"].values()  # 0.1 times the gradient
    assert math.sqrt(sum(float(mx.square(m).sum()) for m in kept)) == pytest.approx(0.1 * 0.01, rel=1e-3)
    ratio = 0.01 / norms[0]
    for one, other in zip(kept, moments(free, "m")["unet"].values(), strict=True):
        np.testing.assert_allclose(np.array(one), ratio * np.array(other), rtol=1e-3, atol=1e-9)


def test_gradient_checkpointing_changes_no_gradient():
    plain, saving = (pixel_trainer("ct", {"model.unet.dropout": 0.0}, batch_size=2, parallel=1) for _ in range(2))
    recompute_blocks(saving.modules["unet"])
    assert saving.advance().loss == plain.advance().loss
    assert difference(moments(saving, "m"), moments(plain, "m")) < 1e-6


# --- half precision


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 0.02), ("bfloat16", 0.15)])
def test_half_precision_computes_halves_and_keeps_float32(monkeypatch, dtype, tolerance):
    seen, resnet = set(), ResnetBlock2D.__call__

    def watched(self, *given, **cond):
        output = resnet(self, *given, **cond)
        seen.add(output.dtype)
        return output

    full, half = (pixel_trainer("teacher", batch_size=4, dtype=one) for one in ("float32", dtype))
    full.advance()
    monkeypatch.setattr(ResnetBlock2D, "__call__", watched)
    report = half.advance()
    assert seen == {getattr(mx, dtype)}
    assert report.is_finite
    assert {value.dtype for _, value in tree_flatten([half.student, half.averages, moments(half, "v")])} == {mx.float32}
    assert 1e-5 < difference(moments(half, "m"), moments(full, "m")) < tolerance
    # A change that the half would round away: 1 + 1e-4 is 1 there.
    assert difference(half.student, full.student) < 2 * 1e-4


def test_an_overflow_skips_the_step_and_halves_the_scale(tmp_path):
    trainer = pixel_trainer("teacher", dtype="float16", **SHORT)
    assert trainer.loss_scale == FIRST_LOSS_SCALE
    trainer.advance()
    trainer.loss_scale = 2.0**40
    before = state_of(trainer)
    report = trainer.advance()
    assert report.skipped
    assert report.is_finite
    assert not math.isfinite(report.gradient_norm)
    assert math.isfinite(report.loss)
    assert state_of(trainer) == before | {"step": 2}
    assert (trainer.loss_scale, trainer.steps_without_overflow) == (2.0**39, 0)

    save_checkpoint(tmp_path, trainer.checkpoint(), keep=1)
    resumed = pixel_trainer("teacher", dtype="float16", **SHORT)
    resumed.restore(load_checkpoint(tmp_path / "step_00000002"))
    assert (resumed.loss_scale, resumed.steps_without_overflow) == (2.0**39, 0)
    resumed.loss_scale = trainer.loss_scale = 2.0**12
    assert resumed.advance() == trainer.advance()
    assert state_of(resumed) == state_of(trainer)
    assert trainer.steps_without_overflow == 1


def test_the_loss_scale_grows_when_nothing_overflows_for_long():
    trainer = pixel_trainer("teacher", dtype="float16", **SHORT)
    trainer.steps_without_overflow = 1999
    trainer.advance()
    assert trainer.loss_scale == 2 * FIRST_LOSS_SCALE


class NotFinite(PixelRows):
    """Pictures with a hole."""

    def load(self, step, start=0, stop=None):
        rows = super().load(step, start, stop)
        return rows | {"x0": mx.where(mx.arange(SIDE)[:, None] == 1, mx.array(math.nan), rows["x0"])}


def test_in_float16_what_overflows_at_any_scale_is_no_matter_of_the_scale():
    trainer = pixel_trainer("teacher", dtype="float16", **SHORT)
    trainer.batches = NotFinite()
    trainer.loss_scale = 2.0
    before = state_of(trainer)
    assert [trainer.advance().is_finite for _ in range(3)] == [True, False, False]
    assert trainer.loss_scale == 1
    assert state_of(trainer) == before | {"step": 3}


def test_a_run_in_float16_can_go_on_from_one_in_float32():
    full = pixel_trainer("teacher", **SHORT)
    half = pixel_trainer("teacher", dtype="float16", **SHORT)
    half.restore(full.checkpoint())
    assert half.loss_scale == FIRST_LOSS_SCALE
    half.loss_scale = 4.0
    full.restore(half.checkpoint())
    assert full.loss_scale == 1


def test_a_loss_that_is_not_finite_is_told():
    trainer = pixel_trainer("teacher", **SHORT)
    assert trainer.advance().is_finite
    assert trainer.checkpoint().is_finite()
    trainer.batches = NotFinite()
    assert not trainer.advance().is_finite
    assert not trainer.checkpoint().is_finite()


# --- what a step costs


@pytest.fixture
def exact_memory():
    """Every array has a piece of memory of its own size; a kept one that is reused may be larger."""
    limit = mx.set_cache_limit(0)
    yield
    mx.set_cache_limit(limit)


def test_a_step_is_evaluated_once_and_memory_does_not_grow(monkeypatch, exact_memory):
    trainer = pixel_trainer("ct", **SHORT)
    trainer.advance()
    evaluated, evaluate = [], mx.eval
    monkeypatch.setattr(mx, "eval", lambda *arrays: evaluated.append(1) or evaluate(*arrays))
    used = []
    for _ in range(5):
        trainer.advance()
        used.append(mx.get_active_memory())
    assert len(evaluated) == 5
    assert len(set(used)) == 1, used


def test_between_steps_the_modules_hold_no_weights_of_their_own(exact_memory):
    trainer = pixel_trainer("ct", overrides={"model.unet.block_out_channels": [64]}, batch_size=2, ema=[0.9])
    mx.eval(trainer.student)
    size = sum(value.nbytes for value in trainer.student["unet"].values())
    before = mx.get_active_memory()  # the student
    trainer.advance()
    grown = mx.get_active_memory() - before
    assert grown == pytest.approx(4 * size, rel=0.05)  # target, average, two moments


def test_a_checkpoint_shares_the_arrays_of_the_trainer():
    trainer = pixel_trainer("ct", **SHORT)
    trainer.advance()
    before = mx.get_active_memory()
    checkpoint = trainer.checkpoint()
    assert mx.get_active_memory() == before
    bits = checkpoint_bits(checkpoint)
    trainer.advance()
    assert checkpoint_bits(checkpoint) == bits
