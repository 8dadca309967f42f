"""`mlx-cm train`: exit codes, what goes to stdout and stderr, signals, kills, and several processes."""

import contextlib
import fcntl
import json
import os
import pty
import random
import re
import signal
import socket
import struct
import subprocess
import termios
import time
from pathlib import Path

import mlx.core as mx
import pytest
from command import interrupted
from tiny_training import DIVERGING, kept_in, newest, program, write_config, write_data

from mlx_cm.training.checkpoints import checkpoint_folders
from mlx_cm.training.log import read_log
from mlx_cm.training.run import train

STEPS = 16
KILLS = 5
PROCESSES = 2


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with data and settings."""
    folder = tmp_path_factory.mktemp("place")
    write_data(folder / "data.npz")
    # Every step leaves a trace, and there are too many of them to be through before a signal comes.
    write_config(folder / "ct.toml", steps=STEPS, log_every=1, checkpoint_every=6, sample_every=8)
    return folder


@pytest.fixture(scope="module")
def whole(place) -> Path:
    """The run that nothing has stopped; to be read only."""
    train("ct", place / "whole", data=place / "data.npz", config=place / "ct.toml")
    return place / "whole"


def begin(place: Path, folder: Path, *options: str) -> list[object]:
    """Arguments that start a run."""
    return ["train", "ct", "--data", place / "data.npz", "--config", place / "ct.toml", "-o", folder, *options]


def steps_of(folder: Path) -> int:
    """How many steps a run has noted."""
    path = folder / "log.csv"
    return max(path.read_text().count("\n") - 1, 0) if path.exists() else 0


# --- what it says


def test_a_run_from_start_to_end(run, place):
    short = ["--set", "train.steps=2", "--set", "train.ema=[0.5]", "--set", "samples.steps=[1]"]
    result = run(*begin(place, Path("a"), *short))
    assert (result.code, result.lines, result.err) == (0, ["a/model"], "")
    result = run(*begin(place, Path("b"), *short, "--json"))
    assert json.loads(result.out) == {"run": "b", "model": "b/model", "step": 2}
    result = run("train", "ct", "-o", "a", "--resume", "--set", "train.steps=3")
    assert (result.code, result.lines) == (0, ["a/model"])
    assert result.err == "the run goes on with other settings than it had: train.steps\n"
    result = run(*begin(place, Path("a")))
    assert (result.code, result.out) == (6, "")
    assert result.err == "error: a: holds a run already\ntry: mlx-cm train ct -o a --resume\n"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["ct", "-o", "r", "--resume"], 3, "error: r: holds no run to resume\ntry: leave --resume out to start one\n"),
        (["ct", "-o", "r"], 2, "error: data: none given\ntry: --data DIR\n"),
        (["ct"], 2, "error: usage: Missing option '-o' / '--output'\ntry: mlx-cm train --help\n"),
        (["gan", "-o", "r", "--data", "d"], 2, "error: method 'gan': expected one of teacher, autoencoder, cd"),
        (["cd", "-o", "r", "--data", "DATA"], 2, "error: model: cd needs a diffusion teacher\ntry: --model REF\n"),
        (["ct", "-o", "r", "--data", "nothing"], 3, "error: nothing"),
        (["ct", "-o", "r", "--data", "d", "--config", "no"], 3, "error: no: is no file, and no recipe of this name"),
        (["ct", "-o", "r", "--data", "d", "--set", "train.stepz=3"], 2, "error: ct: train.stepz: is unknown"),
        (["ct", "-o", "r", "--data", "d", "--set", "trian.steps=3"], 2, "error: ct: trian: expected a section"),
        (["ct", "-o", "r", "--data", "d", "--set", "train.steps=x"], 2, "error: ct: [train]: steps: expected int"),
        (["ct", "-o", "r", "--data", "d", "--set", "train.steps"], 2, "error: usage: Invalid value for '--set'"),
        (["ct", "-o", "r", "--data", "d", "--set", "steps=3"], 2, "error: --set steps: expected SECTION.NAME=VALUE"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(run, place, arguments, code, message):
    result = run("train", *(place / "data.npz" if one == "DATA" else one for one in arguments))
    assert (result.code, result.out) == (code, "")
    assert result.err.startswith(message)
    assert not Path("r").exists()


def test_damaged_checkpoints_are_told(run, place, whole, tmp_path):
    run(*begin(place, Path("r"), "--set", "train.steps=8", "-q"))
    for number, folder in enumerate(checkpoint_folders(Path("r/checkpoints"))):
        path = folder / "student.safetensors"
        path.write_bytes(path.read_bytes()[:100])
        result = run("train", "ct", "-o", "r", "--resume", "--json")
        assert "step_00000008 is damaged: " in result.err
        if number == 0:
            assert (result.code, json.loads(result.out)["step"]) == (0, 8)
            path.write_bytes(path.read_bytes()[:100])
        else:
            assert (result.code, result.out) == (3, "")
            assert "error: r/checkpoints: holds no checkpoint that is whole\n" in result.err


def test_a_loss_that_is_not_finite_ends_with_its_own_code(run, place):
    config = write_config(place / "teacher.toml", "teacher", **DIVERGING, checkpoint_every=1)
    result = run("train", "teacher", "--data", place / "data.npz", "--config", config, "-o", "r")
    assert (result.code, result.out) == (7, "")
    found = re.search(r"the last good checkpoint is r/checkpoints/step_(\d{8})\ntry: mlx-cm train teach", result.err)
    assert newest(Path("r")).name == f"step_{found[1]}"
    assert "--resume --set train.learning_rate=4.5" in result.err


def terminal() -> tuple[int, int]:
    """The two ends of a terminal, the only place where there is a bar."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    return ours, theirs


def shown_on(terminal: int, until: bytes) -> bytes:
    """What a program writes until something matches, or it ends."""
    shown = b""
    with contextlib.suppress(OSError):  # the other end is closed
        while not re.search(until, shown) and (piece := os.read(terminal, 4096)):
            shown += piece
    return shown


@pytest.mark.parametrize("stays", [True, False])
def test_the_bar_has_loss_and_speed_and_a_run_outlives_its_terminal(place, tmp_path, stays):
    ours, theirs = terminal()
    process = subprocess.Popen(
        program(*begin(place, tmp_path / "r", "--set", "train.sample_every=0")),
        stdout=subprocess.PIPE, stderr=theirs, cwd=tmp_path, text=True, start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    line = rb"training: +\d+%.* \d+/16 .*loss [\d.e-]+, [\d.e+]+ images/s"
    assert re.search(line, shown_on(ours, line))
    if stays:
        shown_on(ours, rb"(?!)")
    os.close(ours)  # otherwise every write to the bar fails from now on
    assert process.communicate(timeout=120)[0] == f"{tmp_path}/r/model\n"
    assert process.returncode == 0


# --- signals


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_is_answered_with_a_checkpoint(run, place, whole, tmp_path, name):
    number, folder = signal.Signals[name], tmp_path / "r"
    stopped = interrupted(program(*begin(place, folder, "--json")), tmp_path, number, lambda: steps_of(folder) >= 3)
    step = int(newest(folder).name.removeprefix("step_"))
    assert stopped.returncode == 128 + number
    assert json.loads(stopped.stdout) == {"run": str(folder), "model": None, "step": step}
    assert stopped.stderr == (
        "stopping after this step; again to stop at once, without a checkpoint\n"
        f"error: interrupted: at step {step}, of which there is a checkpoint\n"
        f"try: mlx-cm train ct -o {folder} --resume\n"
    )
    assert steps_of(folder) == step < STEPS
    assert run("train", "ct", "-o", folder, "--resume").code == 0
    assert kept_in(folder) == kept_in(whole)


SLOW = """
import sys, time
sys.path.insert(0, {root!r})
import mlx_cm
from mlx_cm.training.loop import Trainer
def advance(self):
    open({mark!r}, "w").close()
    end = time.monotonic() + 60
    while time.monotonic() < end:
        mx.eval(mx.random.normal((1500, 1500)) @ mx.random.normal((1500, 1500)))
import mlx.core as mx
Trainer.advance = advance
sys.argv[1:] = {arguments!r}
from mlx_cm.cli import main
main()
"""


def test_a_second_signal_ends_a_step_that_takes_long(place, tmp_path):
    mark, arguments = tmp_path / "mark", [str(one) for one in begin(place, tmp_path / "r")]
    root = str(Path(__file__).parent.parent)
    script = SLOW.format(root=root, mark=str(mark), arguments=arguments)
    process = subprocess.Popen(
        [program()[0], "-c", script], cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    wait_for(mark.exists)
    process.send_signal(signal.SIGINT)
    first = process.stderr.readline()  # said while the step goes on
    assert first == "stopping after this step; again to stop at once, without a checkpoint\n"
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 130
    assert time.monotonic() - began < 20
    assert process.stderr.read() == "stopped at once; --resume goes on from the newest checkpoint\n"
    process.stderr.close()


def wait_for(condition) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# --- kills


def test_a_run_that_is_killed_at_random_moments_comes_to_the_same_end(run, place, whole, tmp_path):
    folder, chance, kills = tmp_path / "r", random.Random(0), 0
    for kill in range(KILLS):
        is_begun, before = (folder / "config.toml").exists(), steps_of(folder)
        command = ["train", "ct", "-o", folder, "--resume"] if is_begun else begin(place, folder)
        process = subprocess.Popen(program(*command), cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
        while kill and steps_of(folder) == before and process.poll() is None:  # the first: at any moment of the start
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.2 if kill else 1.5))
        process.kill()
        assert b"error" not in process.communicate()[1]
        kills += process.returncode == -signal.SIGKILL
    assert kills > 1
    result = run("train", "ct", "-o", folder, "--resume")
    assert result.code == 0, result.err
    assert kept_in(folder) == kept_in(whole)
    assert not list(folder.rglob("*.partial"))


# --- several processes


@pytest.fixture
def launch(tmp_path):
    """Starts the program as several processes that share their batches, as `mlx.launch` does."""
    started: list[subprocess.Popen] = []

    def launch(*arguments: object) -> list[subprocess.Popen]:
        sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(PROCESSES)]
        hosts = [[f"127.0.0.1:{one.getsockname()[1]}"] for one in sockets]
        (tmp_path / "hosts.json").write_text(json.dumps(hosts))
        for one in sockets:
            one.close()
        processes = [
            subprocess.Popen(
                program(*arguments), cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                env=os.environ | {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(tmp_path / "hosts.json")},
            )
            for rank in range(PROCESSES)
        ]  # fmt: skip
        started.extend(processes)
        return processes

    yield launch
    for process in started:
        process.kill()
        process.communicate()


def ended(processes: list[subprocess.Popen]) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of each."""
    said = [process.communicate(timeout=120) for process in processes]
    return [(process.returncode, *texts) for process, texts in zip(processes, said, strict=True)]


def assert_about_the_same(ours: Path, theirs: Path) -> None:
    """The same weights, but for rounding."""
    found, expected = (mx.load(str(run / "model/unet/model.safetensors")) for run in (ours, theirs))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert float(mx.abs(found[name] - value).max()) < 1e-5, name


def test_processes_share_a_batch_and_stop_together(launch, run, place, tmp_path):
    # One process takes the batch in two parts where two take one each.
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    options = ["--set", "train.learning_rate=0.001"]
    assert run(*begin(place, alone, *options)).code == 0
    processes = launch(*begin(place, shared, *options, "--set", "train.accumulate=1", "--json"))
    wait_for(lambda: steps_of(shared) >= 2 or processes[0].poll() is not None)
    processes[1].send_signal(signal.SIGTERM)
    first, second = ended(processes)
    step = json.loads(first[1])["step"]
    assert [first[0], second[0]] == [143, 143], (first, second)
    assert second[1] == ""  # only one of them reports, and writes
    assert 2 <= step < STEPS
    assert newest(shared).name == f"step_{step:08}"

    first, second = ended(launch("train", "ct", "-o", shared, "--resume", "--json"))
    assert [first[0], second[0]] == [0, 0], (first, second)
    assert json.loads(first[1]) == {"run": str(shared), "model": str(shared / "model"), "step": STEPS}
    assert (second[1], second[2]) == ("", "")
    assert_about_the_same(shared, alone)
    ours, theirs = (read_log(folder / "log.csv") for folder in (shared, alone))
    for one, other in zip(ours, theirs, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-3)


def test_all_processes_end_when_one_cannot_begin_or_is_gone(launch, place, tmp_path):
    (tmp_path / "r").mkdir()
    (tmp_path / "r/mine.txt").write_text("x")
    for code, out, err in ended(launch(*begin(place, tmp_path / "r"))):
        assert (code, out, err) == (6, "", f"error: {tmp_path}/r: exists already\ntry: choose another name\n")

    processes = launch(*begin(place, tmp_path / "s"))
    wait_for(lambda: steps_of(tmp_path / "s") >= 1)
    processes[1].kill()
    code, _, err = ended(processes)[0]
    assert code == 4
    assert "error: process 0 of 2: another process of this run is gone (" in err
    assert "try: start all of them again with --resume" in err


def test_mlx_launch_starts_them(place, tmp_path):
    launcher = Path(program()[0]).with_name("mlx.launch")
    sockets = socket.create_server(("127.0.0.1", 0))
    port = sockets.getsockname()[1]
    sockets.close()
    options = ["--set", "train.steps=1", "--set", "train.accumulate=1", "--set", "train.sample_every=0", "--json"]
    command = [launcher, "-n", str(PROCESSES), "--backend", "ring", "--starting-port", str(port), "--"]
    process = subprocess.Popen(
        [*map(str, command), *program(*begin(place, tmp_path / "r", *options))],
        cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    with process:  # its stdin stays open, or the launcher takes a whole core to look for its end
        said = process.stdout.read()
    assert process.returncode == 0, said
    assert [json.loads(line)["step"] for line in said.splitlines() if line.startswith("{")] == [1], said
