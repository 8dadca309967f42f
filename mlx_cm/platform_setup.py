"""What has to happen before `mlx.core` is first imported. Only Linux needs any of it."""

import contextlib
import ctypes
import os
import shutil
import sys

OPENBLAS = "libopenblas.so.0"


def prepare() -> None:
    """Makes MLX's CPU back end fast where OpenBLAS is installed, and usable where no C++ compiler is.

    The Linux wheel carries the reference BLAS; OpenBLAS loaded first with global symbols takes its place and makes
    matrix products 20-40 times faster. MLX's CPU `mx.compile` calls `g++` when it runs, even inside `nn.silu`.
    """
    if sys.platform != "linux":
        return
    if "mlx.core" not in sys.modules:
        with contextlib.suppress(OSError):  # without it everything is slower, not wrong
            ctypes.CDLL(OPENBLAS, mode=ctypes.RTLD_GLOBAL)
    if shutil.which("g++") is None:
        os.environ.setdefault("MLX_DISABLE_COMPILE", "1")
