"""Test-wide set-up. The package is imported before torch, so that MLX finds OpenBLAS as a user's process would."""

import signal
import sys
import uuid
from collections.abc import Iterator

import pytest
from command import Result, Run

from mlx_cm import cli as command_line


@pytest.fixture(scope="session", autouse=True)
def one_torch_thread():
    """On models this small, torch's threads spin for ten times the time that the work takes."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def programs_hear_signals():
    """Programs inherit what is ignored, as in a script's background or under `nohup`, but none of Python's handlers."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, lambda *_: None)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """What a test downloads or converts lands in a folder of its own, never in the user's cache."""
    monkeypatch.setenv("MLX_CM_CACHE", str(tmp_path_factory.getbasetemp() / "cache" / uuid.uuid4().hex))


@pytest.fixture
def run(monkeypatch, capfd, tmp_path) -> Iterator[Run]:
    """Runs the program in this process, in an empty folder, as the entry point does."""
    monkeypatch.chdir(tmp_path)
    previous = signal.getsignal(signal.SIGTERM)

    def run(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["mlx-cm", *map(str, arguments)])
        capfd.readouterr()
        try:
            command_line.main()
            code = 0
        except SystemExit as exit_:
            code = exit_.code or 0
        return Result(code, *capfd.readouterr())

    yield run
    signal.signal(signal.SIGTERM, previous)
