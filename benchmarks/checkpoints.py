"""Random checkpoints of published layouts, written one tensor at a time and without torch."""

import functools
import math
import pickle
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from mlx_cm.config import config_to_dict
from mlx_cm.model_folder import parameter_shapes
from mlx_cm.models.unet2d import UNet2DConfig
from mlx_cm.storage import TensorSource, atomic_file, write_json, write_safetensors
from recipes.seeded_model import openai_shapes

CONFIG = "config.json"
SMALL = 0.05  # what is added to normalisations' ones, and the biases


def random_values(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The same float32 values for a name and a shape in every process; of a size that keeps activations near one."""
    generator = np.random.default_rng(zlib.crc32(name.encode()))
    values = generator.standard_normal(shape, dtype=np.float32)
    if len(shape) > 1:
        return values / np.float32(math.sqrt(math.prod(shape[1:])))
    return values * np.float32(SMALL) + np.float32(name.endswith("weight"))


def random_tensors(shapes: dict[str, tuple[int, ...]]) -> list[TensorSource]:
    """Tensors that are made when they are written."""
    return [
        TensorSource(name, "F32", shape, functools.partial(random_values, name, shape))
        for name, shape in shapes.items()
    ]


def openai_tensors(config: UNet2DConfig) -> list[TensorSource]:
    """A checkpoint in the dialect of OpenAI's code."""
    return random_tensors(openai_shapes(config))


def write_component(folder: Path, model: Any, published: str, file: str) -> None:
    """Writes a component as diffusers and transformers publish it, for both sides of a comparison.

    Args:
        model: of ours, with the names of the published one; it is not computed.
        published: the class that reads it there.
        file: its weights.
    """
    folder.mkdir()
    write_json(folder / CONFIG, config_to_dict(model.config) | {"_class_name": published})
    shapes = {name: _channels_first(shape) for name, shape in parameter_shapes(model).items()}
    with atomic_file(folder / file) as partial:
        write_safetensors(partial, random_tensors(shapes), {"format": "pt"})


def _channels_first(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[0], shape[3], shape[1], shape[2]) if len(shape) == 4 else shape


def write_torch(path: Path, tensors: Iterable[TensorSource]) -> None:
    """Writes float32 tensors in the format of `torch.save`: a zip of raw storages and a pickle that refers to them."""
    tensors = list(tensors)
    with atomic_file(path) as partial, zipfile.ZipFile(partial, "w") as archive:
        archive.writestr("archive/data.pkl", _state_dict_pickle(tensors))
        archive.writestr("archive/byteorder", "little")
        for number, tensor in enumerate(tensors):
            with archive.open(f"archive/data/{number}", "w", force_zip64=True) as storage:
                storage.write(np.ascontiguousarray(tensor.read()).data.cast("B"))
        archive.writestr("archive/version", "3\n")


def _state_dict_pickle(tensors: list[TensorSource]) -> bytes:
    """The pickle of an OrderedDict of tensors, each the whole of the storage of its number."""
    ordered_dict = _global("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE
    items = b""
    for number, tensor in enumerate(tensors):
        strides = [math.prod(tensor.shape[axis + 1 :]) for axis in range(len(tensor.shape))]
        storage = ("storage", _global("torch", "FloatStorage"), str(number), "cpu", math.prod(tensor.shape))
        arguments = (_pickled(storage) + pickle.BINPERSID, 0, tensor.shape, tuple(strides), False, ordered_dict)
        rebuilt = _global("torch._utils", "_rebuild_tensor_v2") + _pickled(arguments) + pickle.REDUCE
        items += _pickled(tensor.name) + rebuilt
    return pickle.PROTO + b"\x02" + ordered_dict + pickle.MARK + items + pickle.SETITEMS + pickle.STOP


def _global(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()


def _pickled(value: Any) -> bytes:
    """The operations that make a value; bytes are operations already."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, tuple):
        return pickle.MARK + b"".join(map(_pickled, value)) + pickle.TUPLE
    return pickle.dumps(value, protocol=2)[2:-1]  # without the header and the full stop
