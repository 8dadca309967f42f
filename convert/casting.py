"""Number formats of stored tensors, bfloat16 included, which NumPy does not know."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from mlx_cm.errors import ModelError
from mlx_cm.storage import NUMPY_DTYPES, TensorSource

# What the user calls them => what safetensors calls them.
DTYPE_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
FLOATS = {"F64", *DTYPE_NAMES.values()}


def cast(tensor: TensorSource, dtype: str | None) -> TensorSource:
    """The tensor in another float format; integers stay as they are.

    Args:
        dtype: a safetensors name; None keeps the source's format, but float64, which Metal has not, becomes float32.

    Raises:
        ModelError: the source's format cannot be converted; when read, also where a value does not fit into `dtype`.
    """
    wanted = dtype or ("F32" if tensor.dtype == "F64" else tensor.dtype)
    if tensor.dtype == wanted or (tensor.dtype not in FLOATS and tensor.dtype[0] in "IUB"):
        return tensor
    if tensor.dtype not in FLOATS:
        raise ModelError(tensor.name, f"holds {tensor.dtype} numbers, which cannot be converted to {wanted}")
    return replace(tensor, dtype=wanted, read=_converted(tensor, wanted))


def _converted(tensor: TensorSource, wanted: str) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        values = to_float32(tensor.read(), tensor.dtype)
        if wanted == "BF16":
            return float32_to_bfloat16(values)
        with np.errstate(over="ignore"):
            converted = values.astype(NUMPY_DTYPES[wanted])
        if wanted == "F16" and not np.array_equal(np.isfinite(converted), np.isfinite(values)):
            largest = float(np.abs(values[np.isfinite(values)]).max())
            raise ModelError(
                tensor.name, f"has values up to {largest:g}, beyond float16's 65504", "use --dtype bfloat16 or float32"
            )
        return converted

    return read


def to_float32(array: np.ndarray, dtype: str) -> np.ndarray:
    """Values of a float tensor given by its bits."""
    if dtype == "BF16":  # the upper half of a float32
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32, copy=False)


def float32_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Bits of the nearest bfloat16, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)
