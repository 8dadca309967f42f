"""Converting a foreign checkpoint to a native model folder, one tensor in memory at a time."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import mlx_cm
from mlx_cm.config import config_from_dict
from mlx_cm.convert.casting import DTYPE_NAMES, cast
from mlx_cm.convert.families import COMPONENTS, LONE_COMPONENTS, PIPELINES, detect
from mlx_cm.convert.keymaps.rules import apply_rules
from mlx_cm.convert.readers import Checkpoint, open_checkpoint
from mlx_cm.errors import DiskError, ModelError, UsageError
from mlx_cm.model_folder import (
    MODEL_INDEX,
    MODELS,
    ModelIndex,
    class_of,
    is_native,
    parameter_shapes,
    write_component,
    write_model_index,
    write_schedule,
)
from mlx_cm.pipelines.pixel import PixelSettings
from mlx_cm.presets import PRESETS
from mlx_cm.schedules import KarrasSchedule
from mlx_cm.storage import TensorSource, atomic_folder, disk_errors, read_json, sha256_file

SCHEDULER = "scheduler"
SPARE_BYTES = 64 * 2**20  # left free on the disk beside the model itself

Progress = Callable[[int, int, str], None]  # (bytes done, bytes in all, tensor)


@dataclass(frozen=True)
class Options:
    """How to convert."""

    dtype: str | None = None  # "float32", "float16", "bfloat16"; None keeps the source's
    preset: str | None = None  # of mlx_cm.presets: what the tensors of pixel models cannot tell
    overrides: Mapping[str, Any] = field(default_factory=dict)  # config fields that a flat checkpoint does not hold
    variant: str | None = None  # "fp16": the variant of the source files
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
class Report:
    """What a conversion did."""

    destination: Path
    family: str
    components: dict[str, str]
    tensors: int
    parameters: int
    bytes: int
    notes: tuple[str, ...]  # decisions that the user may want to overrule
    verified: bool


@dataclass(frozen=True)
class Component:
    """A component ready to be written: nothing but headers has been read."""

    config: Any
    checkpoint: Checkpoint
    tensors: dict[str, TensorSource]  # by parameter

    @property
    def kind(self) -> str:
        """The class that the config configures."""
        return class_of(self.config)


@dataclass(frozen=True)
class Plan:
    """A whole model ready to be written."""

    pipeline: str
    family: str
    components: dict[str, Component]
    schedule: Any
    sampler: dict[str, Any]
    notes: tuple[str, ...] = ()


def convert(source: Path, destination: Path, options: Options | None = None) -> Report:
    """Converts a checkpoint file, a component folder or a pipeline folder to a native model folder.

    The folder appears under its name only when it is complete.

    Args:
        source: `.safetensors`, `.pt`, `.pth`, `.ckpt`, `.bin`, or a folder of diffusers' layout.
        destination: the folder to make.

    Raises:
        ModelError: the source is missing, broken, unknown, or does not fit its config.
        UsageError: an option has no use for this source.
        DiskError: the destination exists, or there is not enough space.
    """
    source, destination, options = Path(source), Path(destination), options or Options()
    if destination.exists() and not options.overwrite:
        raise DiskError(str(destination), "exists already", "choose another name or pass --overwrite")
    if _is_within(source, destination):
        raise UsageError(str(destination), "holds the source, which would be overwritten")
    plan = plan_conversion(source, options)
    total = sum(tensor.nbytes for component in plan.components.values() for tensor in component.tensors.values())
    _check_space(destination, total)
    with atomic_folder(destination, overwrite=options.overwrite) as partial:
        _write(plan, partial, source, options, total)
        if options.verify:
            _verify(plan, partial)
    tensors = [tensor for component in plan.components.values() for tensor in component.tensors.values()]
    return Report(
        destination=destination,
        family=plan.family,
        components={part: component.kind for part, component in plan.components.items()},
        tensors=len(tensors),
        parameters=sum(int(np.prod(tensor.shape, dtype=np.int64)) for tensor in tensors),
        bytes=total,
        notes=plan.notes,
        verified=options.verify,
    )


def plan_conversion(source: Path, options: Options) -> Plan:
    """Recognises the source and maps every tensor; reads headers only."""
    source = Path(source)
    if not source.exists():
        raise ModelError(str(source), "no such file or folder")
    if (source / MODEL_INDEX).is_file():
        if is_native(source):
            raise UsageError(str(source), "is a native model already")
        return _plan_pipeline(source, options)
    config_path = (source if source.is_dir() else source.parent) / "config.json"
    if config_path.is_file() and (source.is_dir() or read_json(config_path).get("_class_name") in COMPONENTS):
        return _plan_lone_component(source, config_path, options)
    return _plan_flat(source, options)


def _plan_pipeline(source: Path, options: Options) -> Plan:
    index = read_json(source / MODEL_INDEX)
    name = index.get("_class_name")
    if name not in PIPELINES:
        raise ModelError(
            str(source / MODEL_INDEX), f"_class_name {name!r} is not supported, expected one of {list(PIPELINES)}"
        )
    family = PIPELINES[name]
    _refuse_overrides(options)
    components = {
        part: _component_with_config(source / part, source / part / "config.json", options)
        for part in family.components
    }
    scheduler_path = source / SCHEDULER / "scheduler_config.json"
    try:
        schedule, sampler = family.scheduler(read_json(scheduler_path))
    except (TypeError, ValueError) as error:
        raise ModelError(str(scheduler_path), str(error)) from None
    return _with_preset(Plan(family.native, name, components, schedule, sampler), options)


def _plan_lone_component(source: Path, config_path: Path, options: Options) -> Plan:
    _refuse_overrides(options)
    component = _component_with_config(source, config_path, options)
    native = component.kind
    if native not in LONE_COMPONENTS:
        raise ModelError(str(source), f"holds a {native} alone; a whole model needs the folder above it")
    part, pipeline = LONE_COMPONENTS[native]
    return _with_preset(Plan(pipeline, native, {part: component}, KarrasSchedule(), {}), options)


def _plan_flat(source: Path, options: Options) -> Plan:
    checkpoint = open_checkpoint(source, variant=options.variant)
    family = detect(checkpoint.tensors, str(source))
    values = family.config(checkpoint.tensors, options.overrides)
    config = config_from_dict(MODELS[family.native][1], values, str(source))
    component = _mapped(config, checkpoint, family.rules(config), options, str(source))
    plan = Plan(family.pipeline, family.title, {family.component: component}, KarrasSchedule(), {})
    return _with_preset(plan, options)


def _component_with_config(source: Path, config_path: Path, options: Options) -> Component:
    values = read_json(config_path)
    name = values.get("_class_name")
    if name not in COMPONENTS:
        raise ModelError(str(config_path), f"_class_name {name!r} is not supported, expected one of {list(COMPONENTS)}")
    family = COMPONENTS[name]
    config = config_from_dict(MODELS[family.native][1], values, str(config_path))
    checkpoint = open_checkpoint(source, variant=options.variant)
    return _mapped(config, checkpoint, family.rules(config), options, str(source))


def _mapped(config: Any, checkpoint: Checkpoint, rules: list, options: Options, where: str) -> Component:
    model_class = next(model for model, config_class in MODELS.values() if config_class is type(config))
    try:
        mapped = apply_rules(checkpoint.tensors, rules, parameter_shapes(model_class(config)))
    except ModelError as error:
        raise ModelError(where, error.why, error.hint) from None
    dtype = DTYPE_NAMES[options.dtype] if options.dtype else None
    return Component(config, checkpoint, {name: cast(tensor, dtype) for name, tensor in mapped.items()})


def _with_preset(plan: Plan, options: Options) -> Plan:
    """Adds what a preset knows, or says that nobody told which of the published models this is."""
    if plan.pipeline != "ConsistencyModelPipeline":
        if options.preset:
            raise UsageError(f"preset {options.preset}", "is for pixel-space consistency models only")
        return plan
    settings = dict(plan.sampler)
    schedule, notes = plan.schedule, list(plan.notes)
    if options.preset:
        preset = PRESETS[options.preset]
        settings |= {"preset": options.preset, "parameterization": preset.parameterization}
        schedule = KarrasSchedule(**{**vars(schedule), "num_scales": preset.num_scales})
    elif not plan.sampler:
        notes.append(
            "the tensors do not tell how the model was trained: taken as a consistency model with a grid of "
            f"{schedule.num_scales} noise levels; if it is a published one, pass --preset NAME ({', '.join(PRESETS)})"
        )
    settings = vars(PixelSettings(**settings))
    return Plan(plan.pipeline, plan.family, plan.components, schedule, settings, tuple(notes))


def _refuse_overrides(options: Options) -> None:
    if options.overrides:
        raise UsageError(
            f"config {', '.join(options.overrides)}", "this source has a config.json, which says it; edit that instead"
        )


def _write(plan: Plan, folder: Path, source: Path, options: Options, total: int) -> None:
    done = 0

    def reporting(tensor: TensorSource) -> TensorSource:
        def read() -> np.ndarray:
            nonlocal done
            data = tensor.read()
            done += tensor.nbytes
            if options.progress is not None:
                options.progress(done, total, tensor.name)
            return data

        return TensorSource(tensor.name, tensor.dtype, tensor.shape, read)

    weights, files = {}, []
    for part, component in plan.components.items():
        digests = write_component(folder / part, component.config, map(reporting, component.tensors.values()))
        weights |= {f"{part}/{name}": digest for name, digest in digests.items()}
        files += [
            {
                "name": path.relative_to(source).as_posix() if source.is_dir() else path.name,
                "bytes": path.stat().st_size,
                "sha256": sha256_file(path),
            }
            for path in component.checkpoint.files
        ]
    write_schedule(folder / SCHEDULER, plan.schedule)
    provenance = {
        "source": options.source or source.resolve().name,
        "revision": options.revision,
        "family": plan.family,
        "files": files,
        "converter": f"mlx-cm {mlx_cm.__version__}",
        "dtype": options.dtype,
    }
    kinds = {part: component.kind for part, component in plan.components.items()}
    kinds[SCHEDULER] = type(plan.schedule).__name__
    write_model_index(folder, ModelIndex(plan.pipeline, kinds, plan.sampler, provenance, weights))


def _verify(plan: Plan, folder: Path) -> None:
    """Reads every tensor back from the disk and compares it bit for bit with the source's."""
    for part, component in plan.components.items():
        written = open_checkpoint(folder / part).tensors
        for name, tensor in component.tensors.items():
            if written[name].shape != tensor.shape or not np.array_equal(_bits(written[name]), _bits(tensor)):
                raise ModelError(f"{part}/{name}", "differs from the source after writing", "check the disk")


def _bits(tensor: TensorSource) -> np.ndarray:
    """The bytes of a tensor; unlike its numbers, equal where there is a NaN."""
    return np.ascontiguousarray(tensor.read()).reshape(-1).view(np.uint8)


def _check_space(destination: Path, total: int) -> None:
    existing = next(parent for parent in [destination.absolute(), *destination.absolute().parents] if parent.exists())
    with disk_errors(destination):
        free = shutil.disk_usage(existing).free
    if free < total + SPARE_BYTES:
        raise DiskError(
            str(destination),
            f"needs {total / 1e9:.2f} GB and the disk has {free / 1e9:.2f} GB free",
            "free some space, choose another disk, or convert with --dtype float16",
        )


def _is_within(source: Path, destination: Path) -> bool:
    source, destination = source.resolve(), destination.resolve()
    return source == destination or destination in source.parents
