"""Runs: what lies in their folder, and that none is lost, whatever stops it."""

import errno
import json
import logging
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image
from tiny_training import DIVERGING, SIDE, kept_in, logged, newest, write_config, write_data

import mlx_cm
from mlx_cm.errors import DiskError, ModelError, OutputError, UsageError
from mlx_cm.training import checkpoints, data, log, run, run_folder, stopping
from mlx_cm.training.checkpoints import checkpoint_folders, load_checkpoint
from mlx_cm.training.curve import draw_curve
from mlx_cm.training.loop import StepReport, Trainer
from mlx_cm.training.run import train

STEPS = 6


@pytest.fixture(autouse=True)
def no_curve(monkeypatch):
    """Drawing takes longer than all the steps of such a run."""
    monkeypatch.setattr(run, "draw_curve", lambda source, path: False)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with data and settings."""
    folder = tmp_path_factory.mktemp("place")
    write_data(folder / "data.npz")
    write_config(folder / "ct.toml")
    return folder


@pytest.fixture(scope="module")
def whole(place) -> Path:
    """A run that nothing has stopped; to be read only."""
    started(place, place / "whole")
    return place / "whole"


def started(place: Path, folder: Path, method: str = "ct", **options) -> run.Result:
    """A run from its beginning."""
    return train(method, folder, data=place / "data.npz", config=place / f"{method}.toml", **options)


class Crash(Exception):
    """Stands for the end of a process."""


def crash_at(step: int):
    """Ends a run once a step is done and what belongs to it is written."""

    def on_step(report: StepReport, total: int, speed: float) -> None:
        if report.step == step:
            raise Crash

    return on_step


def crashed(place: Path, folder: Path, step: int, **options) -> Path:
    """A run that ended without notice after a step."""
    with pytest.raises(Crash):
        started(place, folder, on_step=crash_at(step), **options)
    return folder


# --- the folder


def test_what_a_run_leaves(place, whole):
    names = {str(path.relative_to(whole)) for path in whole.rglob("*") if path.is_file()}
    weights = ("student", "target", "ema_0.9", "ema_0.99", "m", "v")
    assert names == {
        "config.toml", "run.json", "log.csv", "loss.png",
        *(f"samples/step_0000000{step}_{count}.png" for step in (3, 6) for count in (1, 2)),
        *(f"checkpoints/step_0000000{step}/{name}.safetensors" for step in (4, 6) for name in weights),
        *(f"checkpoints/step_0000000{step}/state.json" for step in (4, 6)),
        "model/model_index.json", "model/unet/config.json", "model/unet/model.safetensors",
        "model/scheduler/scheduler_config.json",
    }  # fmt: skip
    told = json.loads((whole / "run.json").read_text())
    assert told["method"] == "ct"
    assert told["data"] == str(place / "data.npz")
    rows = log.read_log(whole / "log.csv")
    assert [row["step"] for row in rows] == [2, 4, 6]
    columns = {"step", "loss", "distance", "gradient_norm", "images_per_second", "learning_rate", "num_scales"}
    assert set(rows[0]) == columns | {"target_rate"}
    assert len({row["num_scales"] for row in rows}) == 3


def test_the_model_is_the_first_average_and_makes_pictures(whole):
    pipe = mlx_cm.load(whole / "model")
    kept = load_checkpoint(newest(whole)).arrays["ema_0.9"]
    for name, value in mx.load(str(whole / "model/unet/model.safetensors")).items():
        np.testing.assert_array_equal(np.array(value), np.array(kept[f"unet.{name}"]))
    (picture,) = pipe.generate(labels=[1], steps=2, seed=0)
    assert picture.size == (SIDE, SIDE)


def test_neither_the_model_nor_the_checkpoints_say_where_they_were_made(place, whole):
    for path in [*whole.glob("model/**/*"), *whole.glob("checkpoints/**/*")]:
        if path.is_file():
            assert place.name.encode() not in path.read_bytes(), path
    told = json.loads((whole / "model/model_index.json").read_text())
    assert told["provenance"]["training"] == {"method": "ct", "steps": STEPS, "seed": 0}


def test_samples_are_the_pictures_that_the_model_makes(whole):
    with Image.open(whole / "samples/step_00000006_2.png") as sheet:
        assert sheet.size == (2 * SIDE + 3 * 8, SIDE + 2 * 8)
        shown = np.array(sheet)[8 : 8 + SIDE, 8 : 8 + SIDE]
    (picture,) = mlx_cm.load(whole / "model").generate(steps=2, seed=0)
    np.testing.assert_allclose(shown.astype(int), np.array(picture), atol=1)


def test_the_settings_of_a_run_start_it_again(place, whole):
    again = place / "again"
    train("ct", again, data=place / "data.npz", config=whole / "config.toml")
    assert kept_in(again) == kept_in(whole)
    assert (again / "config.toml").read_bytes() == (whole / "config.toml").read_bytes()


def test_what_is_not_asked_for_is_not_made(place, tmp_path):
    result = started(place, tmp_path / "run", overrides={"train.sample_every": 0, "train.checkpoint_every": 0})
    assert not (tmp_path / "run/samples").exists()
    assert [path.name for path in checkpoint_folders(tmp_path / "run/checkpoints")] == ["step_00000006"]
    assert result.model == tmp_path / "run/model"


def test_a_curve_is_drawn_with_each_checkpoint(place, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "draw_curve", draw_curve)
    crashed(place, tmp_path / "run", 4)
    with Image.open(tmp_path / "run/loss.png") as picture:
        assert picture.width > 300


def test_a_run_needs_no_matplotlib_for_its_curve(place, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(run, "draw_curve", draw_curve)
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    caplog.set_level(logging.INFO, "mlx_cm")
    started(place, tmp_path / "run")
    assert not (tmp_path / "run/loss.png").exists()
    assert "no curve is drawn: install mlx-cm[train]" in caplog.text


def test_a_damaged_log_still_gives_a_curve(tmp_path):
    (tmp_path / "log.csv").write_text("step,loss,stage\n1,2.0,\n2,nan,1\n3,0.05,1\nx,y\n4,0.04,2\n5,0.0")
    assert draw_curve(tmp_path / "log.csv", tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size > 1000
    (tmp_path / "log.csv").write_text("step,loss\n1,2.0\n")
    assert not draw_curve(tmp_path / "log.csv", tmp_path / "other.png")


# --- starting


def test_an_existing_folder_is_left_alone(place, whole, tmp_path):
    with pytest.raises(DiskError, match="whole: holds a run already") as error:
        started(place, whole)
    assert error.value.hint == f"mlx-cm train ct -o {whole} --resume"
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(DiskError, match="exists already"):
        started(place, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_start_that_fails_leaves_nothing(place, tmp_path):
    with pytest.raises(ModelError, match=r"none\.npz"):
        train("ct", tmp_path / "run", data=tmp_path / "none.npz", config=place / "ct.toml")
    with pytest.raises(UsageError, match="data: none given"):
        train("ct", tmp_path / "run", config=place / "ct.toml")
    with pytest.raises(UsageError, match=r"model: none given, and \[model.unet\] describes no new one"):
        train("ct", tmp_path / "run", data=place / "data.npz")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("written", [(), ("run.json",)])
def test_a_start_that_was_killed_can_be_repeated(place, whole, tmp_path, written):
    for name in written:
        shutil.copy(whole / name, tmp_path)
    (tmp_path / ".config.toml.0123abcd.partial").write_text("[tr")
    with pytest.raises(ModelError, match="holds no run to resume") as error:
        train("ct", tmp_path, resume=True)
    assert error.value.hint == "leave --resume out to start one"
    started(place, tmp_path, overrides={"train.steps": 1})
    assert (tmp_path / "config.toml").is_file()
    assert not list(tmp_path.glob(".*"))


def test_samples_that_cannot_be_made_are_refused_at_the_start(place, tmp_path):
    with pytest.raises(UsageError, match="steps 200"):
        started(place, tmp_path / "run", overrides={"samples.steps": [1, 200]})
    assert not (tmp_path / "run").exists()


def test_a_folder_belongs_to_one_process(place, tmp_path):
    folder, refused = tmp_path / "run", []

    def meddle(report: StepReport, total: int, speed: float) -> None:
        for resume in (False, True):
            with pytest.raises(DiskError, match="run: is in use: another process trains there"):
                started(place, folder, resume=resume)
            refused.append(report.step)

    started(place, folder, on_step=meddle, overrides={"train.steps": 2})
    assert refused == [1, 1, 2, 2]
    assert started_again(folder).step == 2  # and is free afterwards


def started_again(folder: Path, method: str = "ct", **options) -> run.Result:
    """A run that is resumed."""
    return train(method, folder, resume=True, **options)


def test_a_file_system_without_locks_is_no_obstacle(place, tmp_path, monkeypatch):
    def unsupported(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOTSUP, "no locks here")

    monkeypatch.setattr(run_folder.fcntl, "flock", unsupported)
    assert started(place, tmp_path / "run", overrides={"train.steps": 1}).step == 1


# --- resuming


@pytest.mark.parametrize("step", [1, 4])
def test_a_run_that_a_signal_stopped_goes_on_as_if_it_had_not(place, whole, tmp_path, step):
    def stop(report: StepReport, total: int, speed: float) -> None:
        if report.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    result = started(place, tmp_path / "run", on_step=stop)
    # The signal comes after the step and the next one is finished, unless that is the last.
    assert result.stopped_by in (signal.SIGTERM, 0)
    assert step <= result.step <= step + 1
    assert (result.model is None) == (result.step < STEPS)
    assert newest(tmp_path / "run").name == f"step_0000000{result.step}"
    again = started_again(tmp_path / "run")
    assert (again.step, again.model) == (STEPS, tmp_path / "run/model")
    assert kept_in(tmp_path / "run") == kept_in(whole)


@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_a_run_that_ended_without_notice_goes_on_as_if_it_had_not(place, whole, tmp_path, step):
    crashed(place, tmp_path / "run", step)
    started_again(tmp_path / "run")
    assert kept_in(tmp_path / "run") == kept_in(whole)


def test_stopping_time_after_time_changes_nothing(place, whole, tmp_path):
    crashed(place, tmp_path / "run", 3)
    for step in (4, 5, 6):
        with pytest.raises(Crash):
            started_again(tmp_path / "run", on_step=crash_at(step))
    started_again(tmp_path / "run")
    assert kept_in(tmp_path / "run") == kept_in(whole)


def test_a_run_that_is_done_gives_the_same_result_again(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    for name in ("model", "samples"):
        shutil.rmtree(tmp_path / "run" / name)
    steps = []
    started_again(tmp_path / "run", on_step=lambda report, total, speed: steps.append(report.step))
    assert steps == []
    assert (tmp_path / "run/model/unet/model.safetensors").read_bytes() == (
        whole / "model/unet/model.safetensors"
    ).read_bytes()
    assert {path.name for path in (tmp_path / "run/samples").iterdir()} == {f"step_00000006_{n}.png" for n in (1, 2)}


AUTOENCODER = """
[train]
steps = 4
batch_size = 2
checkpoint_every = 1
sample_every = 2
log_every = 1
[model.vae]
in_channels = 1
out_channels = 1
sample_size = 4
block_out_channels = [4, 4]
down_block_types = ["DownEncoderBlock2D", "DownEncoderBlock2D"]
up_block_types = ["UpDecoderBlock2D", "UpDecoderBlock2D"]
layers_per_block = 1
latent_channels = 2
norm_num_groups = 2
"""


def test_an_autoencoder_resumes_to_the_same_model(place, tmp_path):
    (place / "autoencoder.toml").write_text(AUTOENCODER)
    started(place, tmp_path / "whole", "autoencoder")
    crashed(place, tmp_path / "run", 3, method="autoencoder")
    started_again(tmp_path / "run", "autoencoder")
    assert kept_in(tmp_path / "run") == kept_in(tmp_path / "whole")
    assert sorted(path.name for path in (tmp_path / "run/samples").iterdir()) == [
        "step_00000002.png", "step_00000004.png",
    ]  # fmt: skip


def test_a_run_is_found_from_another_folder(place, whole, tmp_path, monkeypatch):
    monkeypatch.chdir(place)
    with pytest.raises(Crash):
        train("ct", tmp_path / "run", data="data.npz", config="ct.toml", on_step=crash_at(3))
    monkeypatch.chdir(tmp_path)
    started_again(Path("run"))
    assert kept_in(tmp_path / "run") == kept_in(whole)


def test_what_cannot_be_resumed_is_refused(place, whole, tmp_path):
    with pytest.raises(ModelError, match="holds no run to resume"):
        started_again(tmp_path / "none")
    assert not (tmp_path / "none").exists()
    with pytest.raises(UsageError, match="is a run of 'ct'") as error:
        started_again(whole, "cd")
    assert error.value.hint == f"mlx-cm train ct -o {whole} --resume"
    with pytest.raises(UsageError, match="--config: a run that is resumed has its own"):
        started_again(whole, config=place / "ct.toml")
    with pytest.raises(ModelError, match=r"has not the 'ema_0.5' weights"):
        started_again(whole, overrides={"train.ema": [0.5]})
    with pytest.raises(ModelError, match=r"has not the 'student' weights"):
        started_again(whole, overrides={"model.unet.layers_per_block": 2})


def test_what_is_changed_in_a_run_that_goes_on_is_told(place, whole, tmp_path, caplog):
    shutil.copytree(whole, tmp_path / "run")
    overrides = {"train.steps": 7, "train.learning_rate": 0.5, "objective.curriculum": "easy"}
    assert started_again(tmp_path / "run", overrides=overrides).step == 7
    assert "goes on with other settings than it had: train.steps, train.learning_rate, objective.curr" in caplog.text
    caplog.clear()
    assert started_again(tmp_path / "run").step == 7  # remembered
    assert caplog.text == ""
    rows = log.read_log(tmp_path / "run/log.csv")
    assert [row["step"] for row in rows] == [2, 4, 6, 7]
    assert rows[3]["learning_rate"] == 0.5
    assert [row["stage"] == 6 * 8 // 7 for row in rows] == [False, False, False, True]


def test_other_pictures_are_told(place, whole, tmp_path, caplog):
    shutil.copytree(whole, tmp_path / "run")
    write_data(tmp_path / "more.npz", 13)
    started_again(tmp_path / "run", data=tmp_path / "more.npz", overrides={"train.steps": 7})
    assert "changed: the pictures, their captions or labels" in caplog.text
    assert json.loads((tmp_path / "run/run.json").read_text())["data"] == str(tmp_path / "more.npz")


def test_other_streams_are_told(place, tmp_path, caplog):
    crashed(place, tmp_path / "run", 3, overrides={"train.parallel": 2})
    started_again(tmp_path / "run", overrides={"train.parallel": 1})
    assert "how many parts of a batch are computed at once" in caplog.text


# --- damage


def truncated(folder: Path) -> None:
    path = folder / "v.safetensors"
    path.write_bytes(path.read_bytes()[:-7])


def changed(folder: Path) -> None:
    path = folder / "ema_0.9.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def missing(folder: Path) -> None:
    (folder / "student.safetensors").unlink()


def unfinished(folder: Path) -> None:
    (folder / "state.json").unlink()


def garbled(folder: Path) -> None:
    (folder / "state.json").write_text('{"step": 6, "files": 3}')


def moved(folder: Path) -> None:
    text = (folder / "state.json").read_text()
    (folder / "state.json").write_text(text.replace('"step": 6', '"step": 5'))


DAMAGES = {
    truncated: r"v.safetensors: is truncated or corrupt",
    changed: r"ema_0.9.safetensors: is not what was written",
    missing: r"student.safetensors: file is missing",
    unfinished: r"state.json: file is missing",
    garbled: r"state.json: is malformed",
    moved: r"state.json: is malformed",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_checkpoint_is_passed_over_with_a_message(whole, tmp_path, caplog, damage):
    shutil.copytree(whole, tmp_path / "run")
    damage(newest(tmp_path / "run"))
    steps = []
    started_again(tmp_path / "run", on_step=lambda report, total, speed: steps.append(report.step))
    assert re.search(rf"step_00000006 is damaged: .*{DAMAGES[damage]}.*; it is passed over", caplog.text)
    assert steps == [5, 6]
    assert kept_in(tmp_path / "run") == kept_in(whole)


def test_where_all_checkpoints_are_damaged_the_run_is_over(whole, tmp_path, caplog):
    shutil.copytree(whole, tmp_path / "run")
    for folder in checkpoint_folders(tmp_path / "run/checkpoints"):
        truncated(folder)
    before = sorted(path for path in (tmp_path / "run").rglob("*"))
    with pytest.raises(ModelError, match="holds no checkpoint that is whole") as error:
        started_again(tmp_path / "run")
    assert error.value.exit_code == 3
    assert caplog.text.count("is damaged") == 2
    assert sorted(path for path in (tmp_path / "run").rglob("*")) == before


def test_a_damaged_checkpoint_takes_no_place_of_a_good_one(place, tmp_path):
    crashed(place, tmp_path / "run", 4, overrides={"train.keep": 1, "train.checkpoint_every": 2})
    root = tmp_path / "run/checkpoints"
    shutil.copytree(root / "step_00000004", root / "step_00000005")
    truncated(root / "step_00000005")
    (root / "step_00000005").rename(root / "step_00000009")
    started_again(tmp_path / "run", overrides={"train.steps": 5})
    assert [path.name for path in checkpoint_folders(root)] == ["step_00000005"]
    assert load_checkpoint(root / "step_00000005").step == 5


def test_a_checkpoint_in_memory_outlives_its_files(whole, tmp_path):
    shutil.copytree(newest(whole), tmp_path / "step_00000006")
    checkpoint = load_checkpoint(tmp_path / "step_00000006")
    for path in (tmp_path / "step_00000006").iterdir():
        path.write_bytes(b"")
    assert checkpoint.is_finite()


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: text.rindex("\n") - 20],  # cut off within the last row
        lambda text: text.replace("step,", "stop,"),
        lambda text: "\0\ufffd" + text[2:],
        lambda text: "",
        lambda text: text + "9,1\n",
        lambda text: text + "nan" + text[text.rindex("\n4,") + 2 :],
    ],
    ids=["cut", "column", "header", "empty", "short", "no step"],
)
def test_a_damaged_log_stops_no_run(place, whole, tmp_path, damage):
    crashed(place, tmp_path / "run", 4)
    path = tmp_path / "run/log.csv"
    path.write_text(damage(path.read_text()))
    started_again(tmp_path / "run")
    rows = log.read_log(path)
    assert rows[-1] == log.read_log(whole / "log.csv")[-1] | {"images_per_second": rows[-1]["images_per_second"]}
    assert kept_in(tmp_path / "run").items() - {("log", logged(tmp_path / "run"))} <= kept_in(whole).items()


def test_what_a_kill_left_half_written_is_cleared_away(place, tmp_path):
    folder = crashed(place, tmp_path / "run", 4)
    leftovers = [
        folder / "checkpoints/.step_00000005.0123abcd.partial/m.safetensors",
        folder / "samples/.step_00000003_1.png.0123abcd.partial",
        folder / ".model.89abcdef.partial/unet/.model.safetensors.01234567.partial",
    ]
    for path in leftovers:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    (folder / ".mine.partial").write_text("x")
    started_again(folder)
    assert [path.name for path in folder.rglob(".*")] == [".mine.partial"]


# --- failing


def full_after(monkeypatch, module, name: str, calls: int) -> None:
    """Lets a function of a module find the disk full after some calls."""
    function, left = getattr(module, name), [calls]

    def writes(*arguments, **options):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return function(*arguments, **options)

    monkeypatch.setattr(module, name, writes)


# Checkpoints of six files, after two steps and after four.
@pytest.mark.parametrize("calls", [9, 11])
def test_a_full_disk_leaves_the_checkpoints_that_are_there(place, whole, tmp_path, monkeypatch, calls):
    with monkeypatch.context() as patch:
        full_after(patch, checkpoints, "write_safetensors", calls)
        with pytest.raises(DiskError, match=r"step_00000004: no space left on the disk") as error:
            started(place, tmp_path / "run")
    assert error.value.exit_code == 6
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step_00000002"]
    started_again(tmp_path / "run")
    assert kept_in(tmp_path / "run") == kept_in(whole)


@pytest.mark.parametrize(("module", "name"), [(run, "save_image"), (run, "write_model"), (checkpoints, "write_json")])
def test_a_disk_that_is_full_elsewhere_costs_no_run(place, whole, tmp_path, monkeypatch, module, name):
    with monkeypatch.context() as patch:
        full_after(patch, module, name, 1 if module is checkpoints else 0)
        with pytest.raises((DiskError, OSError)):
            started(place, tmp_path / "run")
    started_again(tmp_path / "run")
    assert kept_in(tmp_path / "run") == kept_in(whole)


def test_a_loss_that_is_not_finite_names_the_last_good_checkpoint(place, tmp_path, monkeypatch):
    advance = Trainer.advance

    def spoilt(self: Trainer) -> StepReport:
        report = advance(self)
        return report if report.step < 4 else StepReport(report.step, float("nan"), {}, 1.0, 0.1)

    monkeypatch.setattr(Trainer, "advance", spoilt)
    with pytest.raises(OutputError) as error:
        started(place, tmp_path / "run")
    good = tmp_path / "run/checkpoints/step_00000002"
    assert str(error.value) == (
        f"step 4: the loss is nan, the norm of its gradient 1.0; the last good checkpoint is {good}"
    )
    assert error.value.hint == f"mlx-cm train ct -o {tmp_path}/run --resume --set train.learning_rate=5e-05"
    assert error.value.exit_code == 7
    assert [path.name for path in checkpoint_folders(good.parent)] == [good.name]


def test_without_a_checkpoint_there_is_none_to_name(place, tmp_path):
    write_config(place / "teacher.toml", "teacher", **DIVERGING, checkpoint_every=0)
    with pytest.raises(OutputError, match="there is no checkpoint yet") as error:
        started(place, tmp_path / "run", "teacher")
    assert error.value.hint == "lower train.learning_rate"


def test_weights_that_are_not_finite_take_no_place_of_good_ones(place, tmp_path, monkeypatch):
    advance = Trainer.advance

    def spoilt(self: Trainer) -> StepReport:
        report = advance(self)
        if report.step == 4:  # by an update that overflows, which the loss before it does not tell
            self.student["unet"]["conv_in.bias"] = self.student["unet"]["conv_in.bias"] * float("inf")
        return report

    monkeypatch.setattr(Trainer, "advance", spoilt)
    with pytest.raises(OutputError, match=r"step 4: the weights, .* are not finite; the last good .*step_00000002"):
        started(place, tmp_path / "run", overrides={"train.keep": 1})
    assert [path.name for path in checkpoint_folders(tmp_path / "run/checkpoints")] == ["step_00000002"]


def test_pictures_that_cannot_be_read_any_more_cost_no_step(place, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        rows = data.PixelBatches._rows

        def gone(self, step: int, start: int, stop: int) -> np.ndarray:
            if step == 3:
                raise ModelError("data.npz", "is gone")
            return rows(self, step, start, stop)

        patch.setattr(data.PixelBatches, "_rows", gone)
        with pytest.raises(ModelError, match="is gone"):
            started(place, tmp_path / "run")
    assert newest(tmp_path / "run").name == "step_00000003"
    started_again(tmp_path / "run")
    assert kept_in(tmp_path / "run") == kept_in(whole)


# --- signals


def test_signals_are_as_they_were_after_a_run(place, tmp_path):
    def handlers() -> list:
        return [signal.getsignal(number) for number in stopping.SIGNALS]

    before = handlers()
    started(place, tmp_path / "run", overrides={"train.steps": 1})
    assert handlers() == before
    assert signal.set_wakeup_fd(-1) == -1


def test_a_signal_that_the_process_was_started_to_ignore_stays_ignored(place, tmp_path):
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        result = started(
            place, tmp_path / "run", on_step=lambda *_: os.kill(os.getpid(), signal.SIGHUP),
            overrides={"train.steps": 2},
        )  # fmt: skip
    finally:
        signal.signal(signal.SIGHUP, previous)
    assert (result.step, result.stopped_by) == (2, 0)


def test_the_rows_of_every_part_are_prepared_while_the_step_before_is_computed(place, tmp_path, monkeypatch):
    prepared, rows, advance = set(), data.PixelBatches._rows, Trainer.advance

    def noted(self, *piece: int) -> np.ndarray:
        prepared.add(piece)
        return rows(self, *piece)

    def waiting(self: Trainer) -> StepReport:
        deadline = time.monotonic() + 10
        wanted = {(self.step, start, start + 2) for start in (0, 2)} if self.step else set()
        while not wanted <= prepared and time.monotonic() < deadline:
            time.sleep(0.01)
        assert wanted <= prepared
        return advance(self)

    monkeypatch.setattr(data.PixelBatches, "_rows", noted)
    monkeypatch.setattr(Trainer, "advance", waiting)
    started(place, tmp_path / "run", overrides={"train.steps": 3, "data.workers": 1})
