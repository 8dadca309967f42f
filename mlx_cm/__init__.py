"""Consistency models with MLX.

Layout: images are (B, H, W, C) in [-1, 1]; every array is channels-last.

Sources cited in docstrings:
    [CM]   Song, Dhariwal, Chen, Sutskever: Consistency Models, arXiv 2303.01469
    [EDM]  Karras, Aittala, Aila, Laine: The Design Space of Diffusion-Based Generative Models, arXiv 2206.00364
    [CTM]  Kim et al.: Consistency Trajectory Models, arXiv 2310.02279
    [LCM]  Luo, Tan, Huang, Li, Zhao: Latent Consistency Models, arXiv 2310.04378
    [TCD]  Zheng et al.: Trajectory Consistency Distillation, arXiv 2402.19159
    [LDM]  Rombach et al.: High-Resolution Image Synthesis with Latent Diffusion Models, arXiv 2112.10752
    [ADM]  Dhariwal, Nichol: Diffusion Models Beat GANs on Image Synthesis, arXiv 2105.05233
    [iCT]  Song, Dhariwal: Improved Techniques for Training Consistency Models, arXiv 2310.14189
    [ECT]  Geng, Pokle, Luo, Lin, Kolter: Consistency Models Made Easy, arXiv 2406.14548
    [LPIPS] Zhang et al.: The Unreasonable Effectiveness of Deep Features as a Perceptual Metric, arXiv 1801.03924
"""

import importlib
from pathlib import Path as _Path

from mlx_cm import platform_setup as _platform_setup

__version__ = "0.1.0"

# In a checkout convert/ and cli.py sit beside this package; in a wheel they are inside it.
_root = _Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file() and (_root / "convert").is_dir():
    __path__.append(str(_root))

_platform_setup.prepare()

_PUBLIC = {
    "load": "mlx_cm.loading",
    "load_component": "mlx_cm.loading",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str):
    """Public names load on first use, so that `mlx-cm --help` does not pay for MLX."""
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'mlx_cm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
