"""Foreign checkpoints to native model folders, and back.

`readers` knows containers, `keymaps` names, `families` components; `pixel` and `latent` plan what is to be written,
`conversion` writes it; `exporting` is the way back.
"""

from mlx_cm.convert.adapters import describe_adapter, load_adapter, write_adapter
from mlx_cm.convert.conversion import Report, convert, plan_conversion
from mlx_cm.convert.exporting import export
from mlx_cm.convert.latent_parts import MissingParts
from mlx_cm.convert.model_card import base_model_of_card
from mlx_cm.convert.planning import Options, Plan

__all__ = [
    "MissingParts",
    "Options",
    "Plan",
    "Report",
    "base_model_of_card",
    "convert",
    "describe_adapter",
    "export",
    "load_adapter",
    "plan_conversion",
    "write_adapter",
]
