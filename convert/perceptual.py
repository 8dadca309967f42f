"""Planning the conversion of LPIPS, whose network and heads are published in one file or in two."""

import contextlib
from pathlib import Path

import numpy as np

from mlx_cm.config import config_from_dict
from mlx_cm.convert.casting import to_float32
from mlx_cm.convert.keymaps.lpips import SCALING, Tensors, has_heads, has_network, lpips_config, lpips_rules
from mlx_cm.convert.latent import sort_overrides
from mlx_cm.convert.planning import Options, Plan, mapped, refuse_parts, refuse_preset
from mlx_cm.convert.readers import Checkpoint, open_checkpoint
from mlx_cm.errors import ModelError
from mlx_cm.models.lpips import SCALE, SHIFT, LPIPSConfig

TITLE = "LPIPS on VGG16"
PART = "lpips"

SUFFIXES = {".pth", ".pt", ".bin", ".safetensors"}
CONSTANTS = {f"{SCALING}shift": SHIFT, f"{SCALING}scale": SCALE}
TOLERANCE = 2e-3  # of the constants, which may be rounded to half precision
HALVES = {"network": has_network, "heads": has_heads}
BOTH = (
    "put torchvision's vgg16-397923af.pth and the heads (vgg.pth of the lpips package, or lpips_weights.pt of piq) "
    "into one folder and convert that"
)
NOTE = (
    "computed as the lpips package does; for the variant of OpenAI's consistency models pass "
    "--config pooling=avg --config resize=224"
)


def is_lpips(tensors: Tensors) -> bool:
    """Whether the tensors are LPIPS, or half of it."""
    return any(has_half(tensors) for has_half in HALVES.values())


def open_halves(folder: Path) -> Checkpoint | None:
    """Network and heads as one checkpoint, where they are the two weight files of a folder; otherwise None."""
    with contextlib.suppress(ModelError, OSError):  # what cannot be read is reported by who needs it
        paths = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES) if folder.is_dir() else []
        if len(paths) != len(HALVES):
            return None
        one, other = map(open_checkpoint, paths)
        for network, heads in ((one, other), (other, one)):
            if has_network(network.tensors) and has_heads(heads.tensors) and not has_heads(network.tensors):
                return Checkpoint(network.files + heads.files, {**network.tensors, **heads.tensors})
    return None


def plan_file(source: Path, checkpoint: Checkpoint, options: Options) -> Plan:
    """LPIPS by itself, which is no model of pictures but measures them.

    Raises:
        ModelError: half of it is missing, or it is not the network that it is taken for.
        UsageError: an option that it has no use for.
    """
    refuse_preset(options)
    refuse_parts(options)
    where, tensors = str(source), checkpoint.tensors
    missing = [half for half, has_half in HALVES.items() if not has_half(tensors)]
    if missing:
        raise ModelError(where, f"is half of LPIPS, without its {missing[0]}", BOTH)
    _check_colours(tensors, where)
    given = sort_overrides(options, (LPIPSConfig,), where)[LPIPSConfig]
    try:
        fields = lpips_config(tensors)
    except ModelError as error:
        raise ModelError(where, error.why, error.hint) from None
    config = config_from_dict(LPIPSConfig, fields | given, where)
    component = mapped(config, checkpoint, lpips_rules(tensors), options, where)
    return Plan(component.kind, TITLE, {PART: component}, None, {}, () if given else (NOTE,))


def _check_colours(tensors: Tensors, where: str) -> None:
    """Holds constants that the model has of its own against those in the file."""
    for name, expected in CONSTANTS.items():
        if name in tensors:
            found = to_float32(tensors[name].read(), tensors[name].dtype).reshape(-1)
            if found.shape != (len(expected),) or not np.allclose(found, expected, rtol=0, atol=TOLERANCE):
                raise ModelError(where, f"{name}: expected {list(expected)}, got {found.tolist()}")
