"""What `torch.save` writes: storages outside the pickle, and tensors as views of them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, NoReturn

from mlx_cm.convert.readers.checkpoint import MappedFile
from mlx_cm.convert.readers.pickle_data import Opaque, Symbol
from mlx_cm.errors import ModelError
from mlx_cm.storage import NUMPY_DTYPES, TensorSource

# torch's names => safetensors names. Complex numbers are listed for their size only.
DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
    "complex64": "C64",
    "complex128": "C128",
}
STORAGES = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
    "ComplexFloatStorage": "C64",
    "ComplexDoubleStorage": "C128",
}
DTYPE_OF_SYMBOL = {f"torch.{name}": dtype for name, dtype in DTYPES.items()}
DTYPE_OF_STORAGE = {
    f"{module}.{name}": dtype for module in ("torch", "torch.cuda") for name, dtype in STORAGES.items()
} | {"torch.storage.UntypedStorage": "U8", "torch.UntypedStorage": "U8"}
ITEM_SIZES = {name: dtype.itemsize for name, dtype in NUMPY_DTYPES.items()} | {"C64": 8, "C128": 16}

MOST_DIMENSIONS = 32  # NumPy 1 has no more
MOST_ELEMENTS = 1 << 48


@dataclass(frozen=True)
class Storage:
    """A run of elements outside the pickle, or a part of one."""

    key: str
    dtype: str
    root_numel: int  # elements under `key`
    offset: int  # first element of the part
    numel: int  # elements of the part

    @property
    def root_nbytes(self) -> int:
        """Bytes under `key`."""
        return self.root_numel * ITEM_SIZES[self.dtype]


@dataclass(frozen=True, eq=False)
class Tensor:
    """A view of a storage; offset and strides in elements of `dtype`, as the file claims them."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def storage_from_id(saved: Any) -> Storage:
    """Makes a storage of the persistent id that `torch.save` gives it.

    The id is ("storage", type, key, device, element count), and in files without zip a sixth field: None, or the
    (key, offset, element count) of a part.
    """
    match saved:
        case ("storage", Symbol(path), str(key), str() | None, int(numel)):
            part = None
        case ("storage", Symbol(path), str(key), str() | None, int(numel), part):
            pass
        case _:
            raise ValueError("a reference that names no storage")
    if path not in DTYPE_OF_STORAGE:
        raise ValueError(f"a storage of unknown type {path!r}")
    match part:
        case None:
            offset, part_numel = 0, numel
        case (str(), int(offset), int(part_numel)):
            pass
        case _:
            raise ValueError("a part of a storage without a position")
    if min(numel, offset, part_numel) < 0 or numel > MOST_ELEMENTS or offset + part_numel > numel:
        raise ValueError(f"a storage of {part_numel} elements from {offset} of {numel}")
    return Storage(key, DTYPE_OF_STORAGE[path], numel, offset, part_numel)


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, dtype: str | None = None) -> Tensor:
    counts = [offset, *shape, *strides]
    if not isinstance(storage, Storage) or any(type(count) is not int for count in counts):
        raise ValueError("a tensor that is not made of a storage and whole numbers")
    return Tensor(storage, dtype or storage.dtype, offset, tuple(shape), tuple(strides))


def _rebuild_tensor_v2(
    storage: Any,
    offset: Any,
    shape: Any,
    strides: Any,
    requires_grad: Any = False,
    hooks: Any = None,
    metadata: Any = None,
) -> Tensor:
    if metadata:
        raise ValueError("a tensor with a pending negation or conjugation")
    return _tensor(storage, offset, shape, strides)


def _rebuild_tensor_v3(
    storage: Any,
    offset: Any,
    shape: Any,
    strides: Any,
    requires_grad: Any,
    hooks: Any,
    dtype: Any,
    metadata: Any = None,
) -> Tensor:
    if metadata:
        raise ValueError("a tensor with a pending negation or conjugation")
    if not isinstance(dtype, Symbol) or dtype.path not in DTYPE_OF_SYMBOL:
        raise ValueError(f"a tensor of unknown type {getattr(dtype, 'path', None)!r}")
    return _tensor(storage, offset, shape, strides, DTYPE_OF_SYMBOL[dtype.path])


def _parameter(data: Any, *rest: Any) -> Tensor:
    if not isinstance(data, Tensor):
        raise ValueError("a parameter without a tensor")
    return data


def _from_type(function: Any, kind: Any, arguments: Any, state: Any) -> Tensor:
    """A tensor that carries Python attributes; the attributes are dropped."""
    plain = {"torch.Tensor", "torch._tensor.Tensor", "torch.nn.parameter.Parameter"}
    if not isinstance(kind, Symbol) or kind.path not in plain:
        raise ValueError(f"a tensor of the unknown class {getattr(kind, 'path', None)!r}")
    if not isinstance(function, Symbol) or function.path not in _REBUILD or not isinstance(arguments, tuple):
        raise ValueError(f"a tensor made by {getattr(function, 'path', None)!r}")
    return _REBUILD[function.path](*arguments)


def _size(dimensions: Any = ()) -> tuple:
    if not isinstance(dimensions, (list, tuple)):
        raise ValueError("a size that is no list")
    return tuple(dimensions)


_REBUILD: Mapping[str, Callable[..., Tensor]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor_v2,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor_v3,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch.nn.parameter.Parameter": _parameter,
}
TORCH_CALLS: Mapping[str, Callable[..., Any]] = {
    **_REBUILD,
    "torch._tensor._rebuild_from_type_v2": _from_type,
    "torch.Size": _size,
    "torch.device": lambda *arguments: Opaque("device"),
}


def tensor_source(
    name: str, tensor: Tensor, file: MappedFile, regions: Mapping[str, tuple[int, int]], where: str
) -> TensorSource:
    """Checks a tensor's claims against the file and makes it readable.

    Args:
        name: the tensor's name.
        tensor: as the pickle describes it.
        file: holds the storages.
        regions: storage key => (first byte in the file, bytes).
        where: the file's name, for messages.

    Raises:
        ModelError: an unsupported type, a storage that is missing or of another size, or a view that leaves it.
    """

    def fail(why: str) -> NoReturn:
        raise ModelError(where, f"tensor {name!r} {why}")

    storage, shape, strides = tensor.storage, tensor.shape, tensor.strides
    if tensor.dtype not in NUMPY_DTYPES:
        fail(f"has the type {tensor.dtype}, which is not supported")
    if storage.key not in regions:
        fail(f"refers to storage {storage.key!r}, which the file does not have")
    start, nbytes = regions[storage.key]
    if nbytes != storage.root_nbytes:
        fail(f"refers to storage {storage.key!r} as {storage.root_nbytes} bytes, where the file has {nbytes}")
    if len(shape) != len(strides) or len(shape) > MOST_DIMENSIONS:
        fail(f"has {len(shape)} sizes and {len(strides)} strides")
    if min((tensor.offset, *shape, *strides)) < 0:
        fail("has a negative size, stride or offset")

    item = ITEM_SIZES[tensor.dtype]
    room = storage.numel * ITEM_SIZES[storage.dtype] // item  # elements of the tensor's type
    numel = prod(shape)
    if prod(max(size, 1) for size in shape) > MOST_ELEMENTS:
        fail("is impossibly large")
    if numel > room:
        fail(f"has {numel} elements in a storage of {room}; expanded views have to be saved as copies")
    last = tensor.offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if numel and last >= room:
        fail(f"reaches element {last} of a storage of {room}")
    offset = start + storage.offset * ITEM_SIZES[storage.dtype] + tensor.offset * item
    # The stride of a single element means nothing and may be any number.
    steps = tuple(stride * item if size > 1 else item for size, stride in zip(shape, strides, strict=True))
    return file.tensor(name, tensor.dtype, shape, offset, steps)
