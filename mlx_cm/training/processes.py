"""Several processes that train as one: what the first one knows, all of them know.

With one process alone every function here does nothing but what it is given.
"""

import contextlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map

from mlx_cm import errors
from mlx_cm.errors import MlxCmError, NetworkError

CONNECTION_ERROR = re.compile(r"\[(ring|jaccl|nccl|mpi)\]")  # how MLX's messages of its back ends begin


def launched_processes() -> mx.distributed.Group:
    """The processes that `mlx.launch` has started together; one alone where nothing did.

    Raises:
        NetworkError: the others cannot be reached.
    """
    try:
        return mx.distributed.init()
    except RuntimeError as error:
        raise NetworkError("the processes of this run", f"cannot reach each other ({error})") from error


def first_one_says(group: mx.distributed.Group, make: Callable[[], Any]) -> Any:
    """What the first process makes, for all of them; none goes on before it is made.

    Args:
        make: called on the first process alone; gives what JSON can hold.

    Raises:
        MlxCmError: `make` has raised it, on every process.
    """
    if group.size() == 1:
        return make()
    told = {}
    if group.rank() == 0:
        try:
            told = {"value": make()}
        except MlxCmError as error:
            told = {"error": type(error).__name__, "arguments": error.args}
    told = json.loads(_bytes_of_first(group, json.dumps(told).encode()))
    if "error" in told:
        raise getattr(errors, told["error"])(*told["arguments"])
    return told["value"]


def first_one_first(group: mx.distributed.Group, make: Callable[[], Any]) -> Any:
    """What each process makes, the first before the others: what it puts into a cache is there for them.

    Raises:
        MlxCmError: as raised by `make`; on every process where the first one has.
    """
    made: list[Any] = []
    first_one_says(group, lambda: made.append(make()))
    return made[0] if made else make()


def arrays_of_first(group: mx.distributed.Group, arrays: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """The first process's float32 arrays, for all of them, bit by bit.

    Args:
        arrays: of the same names and shapes on every process.
    """
    if group.size() == 1:
        return dict(arrays)
    shared = _of_first(group, [array.view(mx.uint32) for array in arrays.values()])
    return {name: array.view(mx.float32) for name, array in zip(arrays, shared, strict=True)}


def mean_over_processes(group: mx.distributed.Group, tree: Any) -> Any:
    """The mean of every array of a tree, which has the same shapes on every process."""
    if group.size() == 1:
        return tree
    leaves = [leaf for _, leaf in tree_flatten(tree)]
    mx.eval(leaves)  # see `_of_first`
    means = nn.average_gradients(leaves, group)
    mx.eval(means)
    left = iter(means)
    return tree_map(lambda _: next(left), tree)


def any_of(group: mx.distributed.Group, number: int) -> int:
    """The greatest number that a process gives, so that all decide alike."""
    if group.size() == 1:
        return number
    return int(mx.distributed.all_max(mx.array(number), group=group).item())


@contextlib.contextmanager
def lost_connections(group: mx.distributed.Group) -> Iterator[None]:
    """Turns MLX's error about a process that is gone into one that a user understands.

    Raises:
        NetworkError: another process of the group has ended, or cannot be reached any more.
    """
    try:
        yield
    except RuntimeError as error:
        if group.size() == 1 or not CONNECTION_ERROR.match(str(error)):
            raise
        raise NetworkError(
            f"process {group.rank()} of {group.size()}",
            f"another process of this run is gone ({error})",
            "start all of them again with --resume",
        ) from error


def _bytes_of_first(group: mx.distributed.Group, content: bytes) -> bytes:
    (size,) = _of_first(group, [mx.array(len(content), dtype=mx.uint32)])
    own = np.frombuffer(content if group.rank() == 0 else bytes(size.item()), dtype=np.uint8)
    (shared,) = _of_first(group, [mx.array(own)])
    return np.array(shared).tobytes()


def _of_first(group: mx.distributed.Group, arrays: list[mx.array]) -> list[mx.array]:
    """Whole numbers of the first process as sums with zeros, which every back end knows and which keep all bits.

    Processes have to compute their sums in the same order. MLX orders operations by what they depend on, so here they
    depend on nothing that is still to be computed.
    """
    own = arrays if group.rank() == 0 else [mx.zeros_like(array) for array in arrays]
    mx.eval(own)
    sums = [mx.distributed.all_sum(array, group=group) for array in own]
    mx.eval(sums)
    return sums
