"""The settings of a run: frozen dataclasses by section, read from TOML, each overridden from the command line.

What a run was started with is written back as TOML, every setting spelled out, and starts the same run again.
"""

import dataclasses
import json
import math
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx_cm
from mlx_cm.config import config_from_dict, config_to_dict
from mlx_cm.errors import ModelError, UsageError
from mlx_cm.lora import LCM_LORA_TARGETS
from mlx_cm.model_folder import DTYPES
from mlx_cm.training.data import DataSettings
from mlx_cm.training.methods import METHODS, Method
from mlx_cm.training.optimizers import DECAYS, OPTIMIZERS

NEW_PARTS = ("unet", "schedule", "text_encoder", "tokenizer", "vae")  # of the `[model]` section
RECIPES = "recipes"  # folder of the shipped ones, beside the package in a checkout and inside it in a wheel
EXPORTS = ("ema", "target", "student")


@dataclass(frozen=True)
class TrainSettings:
    """How long and how; the `[train]` section."""

    steps: int = 10_000
    batch_size: int = 16  # pictures per step, over all accumulations and processes
    accumulate: int = 1  # parts that a batch is computed in, one after the other
    parallel: int = 0  # parts of those computed at once; 0: on a CPU as many as it has cores, on a GPU one
    seed: int = 0
    optimizer: str = "adamw"  # of OPTIMIZERS
    learning_rate: float = 1e-4
    betas: tuple[float, ...] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    warmup: int = 0  # steps
    decay: str = "constant"  # of DECAYS, after the warm-up
    clip: float = 1.0  # norm that gradients are clipped to; 0: they are not
    dtype: str = "float32"  # that networks compute in; weights and their averages are float32
    recompute: bool = False  # gradient checkpointing: less memory, a third more time
    compile: bool | None = None  # whether steps are compiled; None: on a GPU
    ema: tuple[float, ...] = (0.999,)  # rates of averages of the weights
    export: str = "ema"  # which weights the model and the samples are made of: the first average, or another of EXPORTS
    log_every: int = 10  # steps
    sample_every: int = 1000  # steps; 0: never
    checkpoint_every: int = 500  # steps; 0: only at the end
    keep: int = 2  # checkpoints

    def __post_init__(self):
        for name, known in (
            ("optimizer", OPTIMIZERS), ("decay", DECAYS), ("dtype", DTYPES), ("export", EXPORTS),
        ):  # fmt: skip
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: {getattr(self, name)!r} is unknown, expected one of {list(known)}")
        for name, least in (
            ("steps", 1), ("batch_size", 1), ("accumulate", 1), ("parallel", 0), ("seed", 0), ("warmup", 0),
            ("log_every", 1), ("sample_every", 0), ("checkpoint_every", 0), ("keep", 1), ("clip", 0),
            ("weight_decay", 0), ("eps", 0),
        ):  # fmt: skip
            if not least <= getattr(self, name) < math.inf:  # false for NaN too
                raise ValueError(f"{name}: expected at least {least}, got {getattr(self, name)}")
        if not 0 < self.learning_rate < 10:  # false for NaN too
            raise ValueError(f"learning_rate: expected above 0, got {self.learning_rate}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas: expected two numbers of at least 0 and below 1, got {list(self.betas)}")
        if not all(0 < rate < 1 for rate in self.ema) or len(set(self.ema)) != len(self.ema):
            raise ValueError(f"ema: expected different rates between 0 and 1, got {list(self.ema)}")
        if self.optimizer == "adam" and self.weight_decay:
            raise ValueError(f"weight_decay {self.weight_decay:g}: adam has none; choose adamw, or 0")
        if self.batch_size % self.accumulate:
            raise ValueError(f"batch_size {self.batch_size} cannot be split into {self.accumulate} equal parts")
        if self.export == "ema" and not self.ema:
            raise ValueError("export: there is no average to export; choose 'student', or give ema a rate")


@dataclass(frozen=True)
class SampleSettings:
    """The pictures that are made on the way, always from the same noise; the `[samples]` section."""

    prompts: tuple[str, ...] = ()  # none: the data's first captions
    count: int = 8
    steps: tuple[int, ...] = (1, 2, 4)  # a row of pictures for each
    guidance_scale: float | None = None  # None: the model's default
    seed: int = 0

    def __post_init__(self):
        if self.count < 1 or not all(steps >= 1 for steps in self.steps):
            raise ValueError("expected count and steps of at least 1")


@dataclass(frozen=True)
class LoraSettings:
    """Adapters instead of the whole model; the `[lora]` section."""

    rank: int = 0  # 0: the whole model is trained
    alpha: float | None = None  # None: the rank
    targets: tuple[str, ...] = LCM_LORA_TARGETS  # names of layers

    def __post_init__(self):
        if self.rank < 0:
            raise ValueError(f"rank: expected at least 0, got {self.rank}")


@dataclass(frozen=True)
class Settings:
    """Everything that decides a run, but for the data and the model it starts from."""

    method: str
    train: TrainSettings
    data: DataSettings
    objective: Any  # of the method's class
    samples: SampleSettings = field(default_factory=SampleSettings)
    lora: LoraSettings = field(default_factory=LoraSettings)
    model: dict[str, Any] = field(default_factory=dict)  # configs of new networks; see `mlx_cm.training.models`

    @property
    def kind(self) -> Method:
        """The method's row."""
        return METHODS[self.method]


SECTIONS = {"train": TrainSettings, "data": DataSettings, "samples": SampleSettings, "lora": LoraSettings}


def read_settings(
    method: str, *, config: str | Path | None = None, overrides: Mapping[str, Any] | Sequence[tuple[str, Any]] = ()
) -> Settings:
    """The settings of a run: the method's defaults, changed by a file, changed by single settings.

    Args:
        method: of METHODS.
        config: a TOML file, or the name of a shipped recipe.
        overrides: "section.name" => value; None: as by default.

    Raises:
        UsageError: an unknown method, section or setting, or a value that is not possible.
        ModelError: the file is missing or no TOML.
    """
    if method not in METHODS:
        raise UsageError(f"method {method!r}", f"expected one of {', '.join(METHODS)}")
    values = {name: dict(section) for name, section in METHODS[method].defaults.items()}
    where = method
    if config is not None:
        path = find_config(config)
        where = path.name
        _merge(values, _read_toml(path, method))
    for name, value in dict(overrides).items():
        _merge(values, _nested(name, value))
    return settings_from_dict(method, values, where)


def settings_from_dict(method: str, values: Mapping[str, Any], where: str) -> Settings:
    """Settings of nested sections.

    Raises:
        UsageError: naming the section and what is wrong.
    """
    classes = SECTIONS | {"objective": METHODS[method].settings}
    for name, section in values.items():
        if name not in (*classes, "model"):
            raise UsageError(f"{where}: {name}", f"expected a section of {', '.join((*classes, 'model'))}")
        if not isinstance(section, Mapping):
            raise UsageError(f"{where}: {name}", f"is a section, but is given as {section!r}")
    described = dict(values.get("model", {}))
    if unknown := sorted(set(described) - set(NEW_PARTS)):
        raise UsageError(f"{where}: [model]", f"does not know {unknown[0]!r}, expected some of {', '.join(NEW_PARTS)}")
    made = {}
    for name, kind in classes.items():
        section, known = values.get(name, {}), [field.name for field in dataclasses.fields(kind)]
        if unknown := sorted(set(section) - set(known)):
            raise UsageError(f"{where}: {name}.{unknown[0]}", f"is unknown, expected one of {', '.join(known)}")
        try:
            made[name] = config_from_dict(kind, section, f"{where}: [{name}]")
        except ModelError as error:
            raise UsageError(error.what, error.why) from None
    return Settings(method, **made, model=described)


def settings_to_dict(settings: Settings) -> dict[str, Any]:
    """The sections of settings, every one spelled out; what is None, which TOML has not, left out."""
    sections = {name: config_to_dict(getattr(settings, name)) for name in (*SECTIONS, "objective")}
    sections = {
        name: {key: value for key, value in section.items() if value is not None} for name, section in sections.items()
    }
    return sections | ({"model": settings.model} if settings.model else {})


def find_config(config: str | Path) -> Path:
    """A TOML file by its path, or a shipped recipe by its name.

    Raises:
        ModelError: neither.
    """
    path = Path(config).expanduser()
    if path.is_file():
        return path
    recipes = shipped_recipes()
    if str(config) in recipes:
        return recipes[str(config)]
    raise ModelError(str(config), "is no file, and no recipe of this name is shipped", f"one of {', '.join(recipes)}")


def shipped_recipes() -> dict[str, Path]:
    """Name => file of the recipes that come with the program."""
    folders = [Path(root) / RECIPES for root in mlx_cm.__path__]
    return {path.stem: path for folder in folders for path in sorted(folder.glob("*.toml"))}


def _read_toml(path: Path, method: str) -> dict[str, Any]:
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(str(path), f"cannot be read ({error.strerror})") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ModelError(str(path), f"is not valid TOML ({error})") from None
    meant = values.pop("method", method)
    if meant != method:
        raise UsageError(str(path), f"is for the method {meant!r}, not {method!r}", f"mlx-cm train {meant}")
    return values


def _merge(values: dict[str, Any], changes: Mapping[str, Any]) -> None:
    """Changes on top of values, section by section; None stands for what is by default."""
    for name, change in changes.items():
        if change is None:
            values.pop(name, None)
        elif isinstance(change, Mapping) and isinstance(values.get(name, {}), dict):
            _merge(values.setdefault(name, {}), change)
        else:
            values[name] = change


def _nested(name: str, value: Any) -> dict[str, Any]:
    """ "train.steps" and a value as sections."""
    section, *inner = name.split(".")
    if not inner or not all((section, *inner)):
        raise UsageError(f"--set {name}", "expected SECTION.NAME=VALUE", "--set train.steps=1000")
    for part in reversed(inner):
        value = {part: value}
    return {section: value}


def to_toml(values: Mapping[str, Any], prefix: str = "") -> str:
    """Nested sections as TOML: numbers, truth values, text and lists of them."""
    plain = {key: value for key, value in values.items() if not isinstance(value, Mapping)}
    lines = [f"{_toml_key(key)} = {_toml_value(value)}" for key, value in plain.items()]
    parts = ["\n".join(lines)] if lines else []
    for key, section in values.items():
        if isinstance(section, Mapping):
            name = f"{prefix}{_toml_key(key)}"
            inner = to_toml(section, f"{name}.")
            parts.append(f"[{name}]\n{inner}" if not inner.startswith("[") else inner)
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def _toml_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _toml_value(key)


def _toml_value(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml_value, value))}]"
    if isinstance(value, float):
        return repr(value)  # JSON has another word for inf
    # TOML reads the text of JSON, but for pairs of surrogates and a control character that JSON lets stand as it is.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def changed_settings(before: Settings, after: Settings) -> list[str]:
    """Names of settings that differ, as "train.steps"."""
    old, new = settings_to_dict(before), settings_to_dict(after)
    names = []
    for section in dict.fromkeys([*old, *new]):
        one, other = old.get(section), new.get(section)
        if isinstance(one, dict) and isinstance(other, dict):
            names += [f"{section}.{key}" for key in dict.fromkeys([*one, *other]) if one.get(key) != other.get(key)]
        elif one != other:
            names.append(section)
    return names
