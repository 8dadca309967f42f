"""Converting a foreign checkpoint to a native model folder, one tensor in memory at a time."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import mlx_cm
from mlx_cm.convert import latent, latent_file, perceptual, pixel
from mlx_cm.convert.families import COMPONENTS
from mlx_cm.convert.keymaps.ldm_autoencoder import is_ldm_autoencoder
from mlx_cm.convert.keymaps.openai_unet import is_openai_unet
from mlx_cm.convert.planning import CONFIG, Options, Plan, component_with_config, published_class
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
from mlx_cm.storage import (
    TensorSource,
    atomic_folder,
    check_free,
    contiguous_pieces,
    disk_errors,
    read_json,
    sha256_file,
)

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
    **dict.fromkeys(
        (
            "LatentConsistencyModelPipeline",
            "LatentConsistencyModelImg2ImgPipeline",
            "StableDiffusionPipeline",
            "StableDiffusionImg2ImgPipeline",
            "StableDiffusionInpaintPipeline",
            "StableDiffusionXLPipeline",
            "StableDiffusionXLImg2ImgPipeline",
            "StableDiffusionXLInpaintPipeline",
        ),
        latent.plan_pipeline,
    ),
}
# In the order they are tried: OpenAI's outer names are also those of latent diffusion.
FILE_FAMILIES = (
    FileFamily(latent_file.TITLE, latent_file.is_ldm_file, latent_file.plan_ldm_file),
    FileFamily(latent_file.AUTOENCODER_TITLE, is_ldm_autoencoder, latent_file.plan_autoencoder_file),
    FileFamily(pixel.OPENAI_TITLE, is_openai_unet, pixel.plan_openai_file),
    FileFamily(perceptual.TITLE, perceptual.is_lpips, perceptual.plan_file),
)


def convert(source: Path, destination: Path, options: Options | None = None) -> Report:
    """Converts a checkpoint file, a component folder or a pipeline folder to a native model folder.

    The folder appears under its name only when it is complete.

    Args:
        source: `.safetensors`, `.pt`, `.pth`, `.ckpt`, `.bin`, or a folder of diffusers' layout; for LPIPS also a
            folder with the two files of its network and its heads.
        destination: the folder to make.

    Raises:
        ModelError: the source is missing, broken, unknown, or does not fit its config.
        UsageError: an option has no use for this source.
        DiskError: the destination exists, or there is not enough space.
    """
    source, destination, options = Path(source), Path(destination), options or Options()
    check_free(destination, options.overwrite)
    for what, path in {"source": source, "base": options.base, "tokenizer": options.tokenizer}.items():
        if path is not None and _is_within(Path(path), destination):
            raise UsageError(str(destination), f"holds the {what}, which would be overwritten")
    plan = plan_conversion(source, options)
    total = sum(tensor.nbytes for component in plan.components.values() for tensor in component.tensors.values())
    check_space(destination, total)
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
        return _plan_component(source, config_path, options)
    return _plan_file(source, options)


def _plan_pipeline(source: Path, options: Options) -> Plan:
    index = read_json(source / MODEL_INDEX)
    name = index.get("_class_name")
    if not isinstance(name, str) or name not in PIPELINES:
        raise ModelError(
            str(source / MODEL_INDEX), f"_class_name {name!r} is not supported, expected one of {list(PIPELINES)}"
        )
    return PIPELINES[name](source, index, options)


def _plan_component(source: Path, config_path: Path, options: Options) -> Plan:
    component = component_with_config(source, options, config_path=config_path)
    if component.kind == pixel.NETWORK:
        return pixel.plan_component(component, options)
    return latent.plan_component(component, source, options)


def _plan_file(source: Path, options: Options) -> Plan:
    checkpoint = perceptual.open_halves(source) or open_checkpoint(source, variant=options.variant)
    for family in FILE_FAMILIES:
        if family.matches(checkpoint.tensors):
            return family.plan(source, checkpoint, options)
    shown = ", ".join(list(checkpoint.tensors)[:5])
    if any(name.startswith(("down_blocks.", "unet.down_blocks.")) for name in checkpoint.tensors):
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

    weights = {}
    for part, component in plan.components.items():
        digests = write_component(folder / part, component.config, map(reporting, component.tensors.values()))
        weights |= {f"{part}/{name}": digest for name, digest in digests.items()}
    for name, content in plan.files.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content if isinstance(content, bytes) else content.read_bytes())
    kinds = {part: component.kind for part, component in plan.components.items()}
    if plan.schedule is not None:
        write_schedule(folder / SCHEDULER, plan.schedule)
        kinds[SCHEDULER] = type(plan.schedule).__name__
    provenance = _provenance(plan, source, options)
    write_model_index(folder, ModelIndex(plan.pipeline, kinds, plan.sampler, provenance, weights))


def _provenance(plan: Plan, source: Path, options: Options) -> dict[str, Any]:
    """Where a model comes from: names and digests of every file that went into it, no paths of this machine."""
    paths = [path for part in plan.components.values() if not part.from_base for path in part.checkpoint.files]
    from_base = [path for part in plan.components.values() if part.from_base for path in part.checkpoint.files]
    for path in plan.files.values():
        if isinstance(path, Path):
            (paths if path.is_relative_to(source) else from_base).append(path)
    origin = {
        "source": options.source or source.resolve().name,
        "revision": options.revision,
        "family": plan.family,
        "files": [_file_entry(path, source) for path in dict.fromkeys(paths)],
        "converter": f"mlx-cm {mlx_cm.__version__}",
        "dtype": options.dtype,
    }
    base = options.base or options.tokenizer
    if base is None:
        return origin
    entries = [_file_entry(path, Path(base)) for path in dict.fromkeys(from_base)]
    return origin | {"base": {"source": options.base_source or Path(base).resolve().name, "files": entries}}


def _file_entry(path: Path, root: Path) -> dict[str, Any]:
    name = path.relative_to(root).as_posix() if root.is_dir() and path.is_relative_to(root) else path.name
    return {"name": name, "bytes": path.stat().st_size, "sha256": sha256_file(path)}


def _verify(plan: Plan, folder: Path) -> None:
    """Reads every tensor back from the disk and compares it bit for bit with the source's."""
    for part, component in plan.components.items():
        written = open_checkpoint(folder / part).tensors
        for name, tensor in component.tensors.items():
            if not _is_equal(written[name], tensor):
                raise ModelError(f"{part}/{name}", "differs from the source after writing", "check the disk")


def _is_equal(one: TensorSource, other: TensorSource) -> bool:
    """Whether two tensors have the same bytes, which unlike numbers are equal where there is a NaN."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    pieces = zip(contiguous_pieces(one.read()), contiguous_pieces(other.read()), strict=True)
    return all(np.array_equal(a.reshape(-1).view(np.uint8), b.reshape(-1).view(np.uint8)) for a, b in pieces)


def check_space(destination: Path, total: int) -> None:
    """Looks for room before anything is written.

    Raises:
        DiskError: there is less than `total` bytes and some to spare.
    """
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
