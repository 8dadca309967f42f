"""What a conversion is going to write: components whose tensors are mapped, nothing but headers read."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_cm.convert.casting import DTYPE_NAMES, cast
from mlx_cm.convert.families import COMPONENTS
from mlx_cm.convert.keymaps.rules import RuleLike, apply_rules
from mlx_cm.convert.readers import Checkpoint, open_checkpoint
from mlx_cm.errors import ModelError, UsageError
from mlx_cm.model_folder import MODELS, class_of, new_model, parameter_shapes
from mlx_cm.presets import PRESETS
from mlx_cm.storage import TensorSource, read_json

CONFIG = "config.json"

Progress = Callable[[int, int, str], None]  # (bytes done, bytes in all, tensor)


@dataclass(frozen=True)
class Options:
    """How to convert."""

    dtype: str | None = None  # "float32", "float16", "bfloat16"; None keeps the source's
    preset: str | None = None  # of mlx_cm.presets: what the tensors of pixel models cannot tell
    overrides: Mapping[str, Any] = field(default_factory=dict)  # config fields that the source does not hold
    variant: str | None = None  # "fp16": the variant of the source files
    base: Path | None = None  # a pipeline folder or native model that gives the parts which the source lacks
    base_source: str | None = None  # what to call the base: a Hub id; None: the folder's name
    tokenizer: Path | None = None  # a folder with CLIP's vocabulary, which single files do not hold
    component: bool = False  # convert a component by itself, where it would be completed to a model
    verify: bool = False  # read back and compare every tensor
    overwrite: bool = False
    source: str | None = None  # what to call the source: a Hub id; None: the file's name
    revision: str | None = None
    progress: Progress | None = None

    def __post_init__(self):
        if self.dtype is not None and self.dtype not in DTYPE_NAMES:
            raise UsageError(f"dtype {self.dtype!r}", f"expected one of {', '.join(DTYPE_NAMES)}")
        if self.preset is not None and self.preset not in PRESETS:
            raise UsageError(f"preset {self.preset!r}", f"expected one of {', '.join(PRESETS)}")


@dataclass(frozen=True)
class Component:
    """A component ready to be written."""

    config: Any
    checkpoint: Checkpoint
    tensors: dict[str, TensorSource]  # by parameter
    from_base: bool = False  # whether it comes from the base and not from the source

    @property
    def kind(self) -> str:
        """The class that the config configures."""
        return class_of(self.config)


@dataclass(frozen=True)
class Plan:
    """A whole model, or a component by itself, ready to be written."""

    pipeline: str
    family: str
    components: dict[str, Component]
    schedule: Any | None  # None for a component by itself
    sampler: dict[str, Any]
    notes: tuple[str, ...] = ()
    files: Mapping[str, Path | bytes] = field(default_factory=dict)  # path inside the model => what to copy there


def component_with_config(
    folder: Path, options: Options, *, config_path: Path | None = None, published: str | None = None
) -> Component:
    """A component that comes with its config.

    Args:
        folder: the component's folder, or its weight file.
        config_path: None: beside the weights.
        published: the class that the folder above names; None: the config says it.

    Raises:
        ModelError: config or weights are missing, broken, of an unsupported class, or do not fit each other.
    """
    config_path = config_path or folder / CONFIG
    values = read_json(config_path)
    published = published or published_class(values)
    if published not in COMPONENTS:
        raise ModelError(str(config_path), f"class {published!r} is not supported, expected one of {list(COMPONENTS)}")
    family = COMPONENTS[published]
    if "_class_name" not in values:  # transformers has a list for it, which the folder above knows better
        values = {**values, "architectures": [published]}
    config = family.read_config(MODELS[family.native][1], values, str(config_path))
    checkpoint = open_checkpoint(folder, variant=options.variant)
    return mapped(config, checkpoint, family.rules(config), options, str(folder))


def published_class(values: Mapping[str, Any]) -> str | None:
    """The class that a config of diffusers or of transformers names."""
    architectures = values.get("architectures")
    named = [values.get("_class_name"), *(architectures if isinstance(architectures, list) else ())]
    return next((name for name in named if isinstance(name, str)), None)


def mapped(
    config: Any, checkpoint: Checkpoint, rules: Iterable[RuleLike], options: Options, where: str, prefix: str = ""
) -> Component:
    """A component of this config, its parameters filled from a checkpoint.

    Args:
        prefix: of the tensors' names in the file; in the checkpoint and the rules they are without it.

    Raises:
        ModelError: see `apply_rules`.
    """
    shapes = parameter_shapes(new_model(config, where))
    try:
        tensors = apply_rules(checkpoint.tensors, rules, shapes, prefix)
    except ModelError as error:
        raise ModelError(where, error.why, error.hint) from None
    dtype = DTYPE_NAMES[options.dtype] if options.dtype else None
    return Component(config, checkpoint, {name: cast(tensor, dtype) for name, tensor in tensors.items()})


def refuse_overrides(options: Options) -> None:
    """Says that a source which comes with its configs is not to be contradicted.

    Raises:
        UsageError: there are overrides.
    """
    if options.overrides:
        raise UsageError(
            f"config {', '.join(options.overrides)}", "this source has a config.json, which says it; edit that instead"
        )


def refuse_parts(options: Options, *names: str) -> None:
    """Says that a source has what these options would give.

    Args:
        names: "base", "tokenizer"; without any, both.

    Raises:
        UsageError: one is given.
    """
    for name in names or ("base", "tokenizer"):
        if getattr(options, name) is not None:
            raise UsageError(f"{name} {getattr(options, name)}", "this source is complete without it")


def refuse_preset(options: Options) -> None:
    """Says that a source is not of the published models that presets are for.

    Raises:
        UsageError: there is a preset.
    """
    if options.preset:
        raise UsageError(f"preset {options.preset}", "is for pixel-space consistency models only")
