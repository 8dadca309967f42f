"""Foreign checkpoints to native model folders, and back.

`readers` knows containers, `keymaps` names, `families` components; `pixel` plans what is to be written, `conversion`
writes it.
"""

from mlx_cm.convert.conversion import Report, convert, plan_conversion
from mlx_cm.convert.planning import Options, Plan

__all__ = ["Options", "Plan", "Report", "convert", "plan_conversion"]
