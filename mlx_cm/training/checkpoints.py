"""Checkpoints: everything that a run needs to go on as if it had never stopped.

A checkpoint is a folder that appears under its name when it is complete. Its `state.json` holds the digest of each of
its files, so that one that has been damaged since is noticed and an older one used.
"""

import logging
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_cm.errors import ModelError
from mlx_cm.model_folder import SAFETENSORS_NAMES
from mlx_cm.storage import (
    TensorSource,
    atomic_folder,
    check_safetensors,
    read_json,
    sha256_file,
    sibling_file,
    write_json,
    write_safetensors,
)

log = logging.getLogger("mlx_cm")

STATE = "state.json"
NAME = re.compile(r"step_(\d{8})")
METADATA = {"format": "mlx", "content": "training"}


@dataclass(frozen=True)
class Checkpoint:
    """What was saved."""

    step: int  # steps done
    arrays: Mapping[str, Mapping[str, mx.array]]  # "student", "target", "ema_0.999", "m", "v" => name => array
    state: Mapping[str, Any]  # JSON's types

    def is_finite(self) -> bool:
        """Whether all of its numbers are."""
        finite = [mx.isfinite(array).all() for arrays in self.arrays.values() for array in arrays.values()]
        return mx.stack(finite).all().item()


def save_checkpoint(root: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Writes a checkpoint, then removes all but the newest `keep`, and those of later steps.

    A run that is at this step has found the later ones damaged.

    Raises:
        DiskError: there is no space; the older checkpoints are untouched.
    """
    folder = root / checkpoint_name(checkpoint.step)
    with atomic_folder(folder, overwrite=True) as partial:
        files = {
            f"{group}.safetensors": write_safetensors(partial / f"{group}.safetensors", _sources(arrays), METADATA)
            for group, arrays in checkpoint.arrays.items()
        }
        write_json(partial / STATE, {"step": checkpoint.step, "files": files, "state": dict(checkpoint.state)})
    there = checkpoint_folders(root)
    kept = there[there.index(folder) :][:keep]
    for other in set(there) - set(kept):
        shutil.rmtree(other, ignore_errors=True)
    return folder


def checkpoint_name(step: int) -> str:
    """The name of the folder of a step's checkpoint."""
    return f"step_{step:08}"


def checkpoint_folders(root: Path) -> list[Path]:
    """The checkpoints of a run, the newest first."""
    if not root.is_dir():
        return []
    return sorted((path for path in root.iterdir() if NAME.fullmatch(path.name)), reverse=True)


def newest_checkpoint(root: Path) -> Checkpoint | None:
    """The newest checkpoint that is whole; damaged ones are named and passed over. None where there is none at all.

    Raises:
        ModelError: there are checkpoints, and all are damaged.
    """
    folders = checkpoint_folders(root)
    for folder in folders:
        try:
            return load_checkpoint(folder)
        except ModelError as error:
            log.warning("%s is damaged: %s; it is passed over", folder, error)
    if folders:
        raise ModelError(str(root), "holds no checkpoint that is whole", "start again in another folder")
    return None


def load_checkpoint(folder: Path) -> Checkpoint:
    """Reads one checkpoint, wholly: its files may be removed afterwards.

    Raises:
        ModelError: missing, truncated or changed files.
    """
    match read_json(folder / STATE):
        case {"step": int(step), "files": {**files}, "state": {**state}} if folder.name == checkpoint_name(step):
            pass
        case _:
            raise ModelError(str(folder / STATE), "is malformed")
    arrays = {}
    for name, digest in files.items():
        path = sibling_file(folder, name)
        check_safetensors(path)
        if sha256_file(path) != digest:
            raise ModelError(str(path), "is not what was written")
        arrays[path.stem] = mx.load(str(path))
    mx.eval(arrays)
    return Checkpoint(step, arrays, state)


def _sources(arrays: Mapping[str, mx.array]) -> list[TensorSource]:
    return [
        TensorSource(name, SAFETENSORS_NAMES[value.dtype], tuple(value.shape), lambda value=value: np.array(value))
        for name, value in arrays.items()
    ]
