"""Converting a foreign checkpoint to a native model folder, one tensor in memory at a time."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import mlx_cm
from mlx_cm.convert import pixel
from mlx_cm.convert.families import COMPONENTS
from mlx_cm.convert.keymaps.openai_unet import is_openai_unet
from mlx_cm.convert.planning import CONFIG, Options, Plan, component_with_config, published_class, refuse_overrides
from mlx_cm.convert.readers import Checkpoint, open_checkpoint
from mlx_cm.convert.schedulers import SCHEDULER
from mlx_cm.errors import DiskError, ModelError, UsageError
from mlx_cm.model_folder import (
    MODEL_INDEX,
    ModelIndex,
    is_native,
    write_component,
    write_model_index,
    write_schedule,
)
from mlx_cm.storage import TensorSource, atomic_folder, disk_errors, read_json, sha256_file

SPARE_BYTES = 64 * 2**20  # left free on the disk beside the model itself


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
class FileFamily:
    """A checkpoint that is nothing but tensors: size and layout are read off them."""

    title: str
    matches: Callable[[Mapping[str, TensorSource]], bool]
    plan: Callable[[Path, Checkpoint, Options], Plan]


# diffusers' pipeline class => how such a folder is converted.
PIPELINES: dict[str, Callable[[Path, Mapping[str, Any], Options], Plan]] = {
    "ConsistencyModelPipeline": pixel.plan_pipeline,
}
FILE_FAMILIES = (FileFamily(pixel.OPENAI_TITLE, is_openai_unet, pixel.plan_openai_file),)
# A component alone is a whole model where nothing else is needed to sample it.
LONE_COMPONENTS = {"UNet2D": pixel.plan_component}


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
    config_path = (source if source.is_dir() else source.parent) / CONFIG
    if config_path.is_file() and (source.is_dir() or published_class(read_json(config_path)) in COMPONENTS):
        return _plan_lone_component(source, config_path, options)
    return _plan_file(source, options)


def _plan_pipeline(source: Path, options: Options) -> Plan:
    index = read_json(source / MODEL_INDEX)
    name = index.get("_class_name")
    if name not in PIPELINES:
        raise ModelError(
            str(source / MODEL_INDEX), f"_class_name {name!r} is not supported, expected one of {list(PIPELINES)}"
        )
    return PIPELINES[name](source, index, options)


def _plan_lone_component(source: Path, config_path: Path, options: Options) -> Plan:
    refuse_overrides(options)
    component = component_with_config(source, options, config_path=config_path)
    if component.kind not in LONE_COMPONENTS:
        raise ModelError(str(source), f"holds a {component.kind} alone; a whole model needs the folder above it")
    return LONE_COMPONENTS[component.kind](component, options)


def _plan_file(source: Path, options: Options) -> Plan:
    checkpoint = open_checkpoint(source, variant=options.variant)
    for family in FILE_FAMILIES:
        if family.matches(checkpoint.tensors):
            return family.plan(source, checkpoint, options)
    shown = ", ".join(list(checkpoint.tensors)[:5])
    if any(name.startswith("down_blocks.") for name in checkpoint.tensors):
        raise ModelError(
            str(source), "has diffusers' names but no config.json beside it", "convert the folder that holds both"
        )
    known = "; ".join(family.title for family in FILE_FAMILIES)
    raise ModelError(str(source), f"its tensors ({shown}, ...) belong to no known family. Known: {known}")


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
