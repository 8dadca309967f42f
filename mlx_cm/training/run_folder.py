"""The folder of a run: who may write it, how it begins, and what it remembers.

RUN/config.toml             every setting; starts the same run again with --config
RUN/run.json                the method, and where data and model were
RUN/log.csv, loss.png       a row each `log_every` steps, and the curve
RUN/samples/                the same noise every `sample_every` steps
RUN/checkpoints/            what --resume goes on from
RUN/model/, RUN/lora/       the result

A run exists once it has its `config.toml`, which is written last.
"""

import contextlib
import fcntl
import logging
import os
import shlex
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import mlx_cm
from mlx_cm.errors import DiskError, ModelError, UsageError
from mlx_cm.storage import atomic_file, disk_errors, partials, read_json, write_json
from mlx_cm.training.settings import changed_settings, read_settings, settings_to_dict, to_toml

log = logging.getLogger("mlx_cm")

CONFIG, STARTED, LOG, CURVE = "config.toml", "run.json", "log.csv", "loss.png"
CHECKPOINTS, SAMPLES, MODEL, LORA = "checkpoints", "samples", "model", "lora"


@contextlib.contextmanager
def reserved(folder: Path) -> Iterator[None]:
    """Holds the right to write a run folder, which is made where it is missing, and clears away what a kill left.

    The right ends with its process, however that ends. Where the file system knows no locks it is not checked.

    Raises:
        DiskError: another process has it, or the folder cannot be made.
    """
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise DiskError(str(folder), "is in use: another process trains there") from None
        for path in partials(folder, deep=True):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        yield
    finally:
        os.close(descriptor)
        with contextlib.suppress(OSError):
            folder.rmdir()  # nothing was written


def beginning(
    folder: Path,
    method: str,
    *,
    data: str | Path | None,
    model: str | Path | None,
    config: str | Path | None,
    overrides: Mapping[str, Any],
    resume: bool,
) -> dict[str, Any]:
    """What a run works with: as given, or as a run that is resumed remembers it, with what was changed.

    Returns:
        JSON's types: "started" as in `run.json`, and "settings" by section.

    Raises:
        UsageError: settings that are not possible, or not with a run that is resumed.
        ModelError: no run to resume.
        DiskError: something is there already.
    """
    if resume:
        started = _remembered(folder, method)
        if config is not None:
            raise UsageError("--config", "a run that is resumed has its own", "--set SECTION.NAME=VALUE")
        settings = read_settings(method, config=folder / CONFIG, overrides=overrides)
        changed = changed_settings(read_settings(method, config=folder / CONFIG), settings)
        if changed:
            log.warning("the run goes on with other settings than it had: %s", ", ".join(changed))
    else:
        _check_new(folder, method)
        started = {"method": method, "data": None, "model": None, "program": f"mlx-cm {mlx_cm.__version__}"}
        settings = read_settings(method, config=config, overrides=overrides)
    given = {"data": data, "model": model}
    started |= {name: _found_from_anywhere(ref) for name, ref in given.items() if ref is not None}
    if started["data"] is None:
        raise UsageError("data", "none given", "--data DIR")
    return {"started": started, "settings": settings_to_dict(settings)}


def write_beginning(folder: Path, told: Mapping[str, Any]) -> None:
    """Writes what `beginning` told, so that the run exists.

    Raises:
        DiskError: there is no space, or no permission.
    """
    with atomic_file(folder / STARTED) as partial:
        write_json(partial, told["started"])
    with atomic_file(folder / CONFIG) as partial:
        partial.write_text(to_toml({"method": told["started"]["method"]} | told["settings"]), encoding="utf-8")


def resume_command(folder: Path, method: str, *options: str) -> str:
    """The command that goes on with a run."""
    return shlex.join(["mlx-cm", "train", method, "-o", str(folder), "--resume", *options])


def _check_new(folder: Path, method: str) -> None:
    there = {path.name for path in folder.iterdir()}
    if CONFIG in there and STARTED in there:
        known = read_json(folder / STARTED).get("method")
        raise DiskError(str(folder), "holds a run already", resume_command(folder, known or method))
    if there - {STARTED}:
        raise DiskError(str(folder), "exists already", "choose another name")


def _remembered(folder: Path, method: str) -> dict[str, Any]:
    if not (folder / STARTED).is_file() or not (folder / CONFIG).is_file():
        raise ModelError(str(folder), "holds no run to resume", "leave --resume out to start one")
    started = {"data": None, "model": None} | read_json(folder / STARTED)
    if started.get("method") != method:
        right = resume_command(folder, started.get("method"))
        raise UsageError(method, f"{folder} is a run of {started.get('method')!r}", right)
    return started


def _found_from_anywhere(ref: str | Path) -> str:
    """A path as one that another working folder does not change; what is no path stays as it is."""
    path = Path(ref).expanduser()
    return str(path.resolve()) if path.exists() else str(ref)
