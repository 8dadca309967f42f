"""What has to happen before `mlx.core` is first imported. Only Linux needs any of it."""

import contextlib
import ctypes
import logging
import os
import shutil
import sys

OPENBLAS = "libopenblas.so.0"


log = logging.getLogger("mlx_cm")


def prepare() -> None:
    """Makes MLX's CPU back end fast where OpenBLAS is installed, and usable where no C++ compiler is.

    The Linux wheel carries the reference BLAS; OpenBLAS loaded first with global symbols takes its place and makes
    matrix products some 30 times faster. MLX's CPU `mx.compile` calls `g++` when it runs, even inside `nn.silu`.
    """
    if sys.platform != "linux":
        return
    with contextlib.suppress(OSError):  # without it everything is slower, not wrong
        if "mlx.core" not in sys.modules:
            ctypes.CDLL(OPENBLAS, mode=ctypes.RTLD_GLOBAL)
        elif not _is_loaded(OPENBLAS) and _computes_on_cpu():
            log.warning("import mlx_cm before mlx: it was too late for OpenBLAS, and products take 30 times as long")
    if shutil.which("g++") is None:
        os.environ.setdefault("MLX_DISABLE_COMPILE", "1")


def _is_loaded(library: str) -> bool:
    """Whether this process has a library already; where the machine has none of the name, there is nothing to miss."""
    try:
        ctypes.CDLL(library, mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
    except OSError:
        ctypes.CDLL(library)
        return False
    return True


def _computes_on_cpu() -> bool:
    core = sys.modules["mlx.core"]
    return core.default_device().type == core.cpu
