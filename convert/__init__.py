"""Foreign checkpoints to native model folders, and back.

`readers` knows containers, `keymaps` names, `families` what belongs together; `conversion` puts them to work.
"""

from mlx_cm.convert.conversion import Options, Plan, Report, convert, plan_conversion

__all__ = ["Options", "Plan", "Report", "convert", "plan_conversion"]
