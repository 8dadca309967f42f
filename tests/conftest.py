"""Test-wide set-up. The package is imported before torch, so that MLX finds OpenBLAS as a user's process would."""

import mlx_cm  # noqa: F401
