"""Loading: from a reference to a pipeline. The one place where foreign checkpoints meet the runtime."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_cm import cache, hub
from mlx_cm.config import config_from_dict
from mlx_cm.errors import ModelError, UsageError
from mlx_cm.model_folder import (
    MODEL_INDEX,
    WEIGHTS_METADATA,
    ModelIndex,
    is_native,
    load_model,
    read_model_index,
    read_schedule,
    resolve_dtype,
    weight_files,
)
from mlx_cm.pipelines.pixel import ConsistencyModelPipeline, PixelSettings
from mlx_cm.presets import preset_of_repository
from mlx_cm.storage import check_safetensors

log = logging.getLogger("mlx_cm")

# A reference that ends so is a file's path, not a Hub id, even where there is no such file.
FILE_SUFFIXES = {".safetensors", ".pt", ".pth", ".ckpt", ".bin", ".pkl", ".png", ".jpg", ".jpeg", ".webp", ".json"}

Progress = Callable[[int, int, str], None]  # (bytes done, bytes in all, what)


def load(
    ref: str | Path,
    dtype: str | None = None,
    quantize: int | None = None,
    lora: Sequence[str] = (),
    *,
    progress: Progress | None = None,
) -> ConsistencyModelPipeline:
    """Loads a model ready to generate.

    A foreign checkpoint is converted once into the cache and loaded from there.

    Args:
        ref: a native model folder; a foreign folder or file; or a Hub id `owner/name[@revision]`.
        dtype: "float32", "float16" or "bfloat16" to compute in; None: float16 on a GPU, float32 on a CPU.
        quantize: bits per weight of the linear layers.
        lora: adapters to apply.
        progress: told of downloads and conversions.

    Raises:
        ModelError: not found, broken, or of an unknown family.
        NetworkError: the Hub cannot be reached or refuses.
        UsageError: a setting that this model has no use for.
        DiskError: no space for the download or the conversion.
    """
    folder = native_folder(ref, dtype=dtype, progress=progress)
    index = read_model_index(folder)
    if index.pipeline not in PIPELINES:
        raise ModelError(str(folder / MODEL_INDEX), f"{index.pipeline!r} is unknown, expected one of {list(PIPELINES)}")
    return PIPELINES[index.pipeline](folder, index, dtype, quantize, lora)


def load_component(folder: str | Path, dtype: str | None = None) -> nn.Module:
    """Loads one component (`unet/`) of a model, native or foreign.

    Raises:
        ModelError: not found, broken, or of an unknown class.
    """
    folder = Path(folder).expanduser()
    if not (folder / "config.json").is_file():
        raise ModelError(str(folder), "is not a component folder: it has no config.json")
    if _has_native_weights(folder):
        return load_model(folder, dtype)
    entry = _converted(folder, cache.local_entry(folder), {}, None)
    index = read_model_index(entry)
    part = next(name for name in index.components if (entry / name / "config.json").is_file())
    return load_model(entry / part, dtype)


def native_folder(ref: str | Path, *, dtype: str | None = None, progress: Progress | None = None) -> Path:
    """The native model folder that a reference stands for, downloaded and converted where needed.

    Raises:
        ModelError: the reference is neither a path that exists nor a Hub id; or as for `load`.
    """
    path = Path(ref).expanduser()
    if path.exists():
        if path.is_dir() and is_native(path):
            return path
        return _converted(path, cache.local_entry(path), {}, progress)
    return _from_hub(hub_reference(ref), "fp16" if resolve_dtype(dtype) == mx.float16 else None, progress)


def convert_ref(source: str | Path, destination: Path, *, progress: Progress | None = None, **options: Any) -> Any:
    """Converts a file, a folder or a Hub repository to a native model folder of the user's own.

    Args:
        options: of `mlx_cm.convert.Options`.

    Returns:
        The `Report` of `mlx_cm.convert.convert`.

    Raises:
        As `mlx_cm.convert.convert` and `mlx_cm.hub.download`.
    """
    from mlx_cm.convert import Options, convert  # only where something is to be converted

    path = Path(source).expanduser()
    if path.exists():
        return convert(path, destination, Options(progress=progress, **options))
    snapshot = _download(hub_reference(source), options.get("variant"), progress)
    origin = {"source": snapshot.repo_id, "revision": snapshot.revision}
    preset = options.pop("preset", None) or preset_of_repository(snapshot.repo_id)
    return convert(snapshot.path, destination, Options(progress=progress, preset=preset, **origin, **options))


def plan_ref(source: Path) -> Any:
    """What a conversion of a file or folder would do; reads headers only.

    Returns:
        The `Plan` of `mlx_cm.convert`.

    Raises:
        ModelError: unknown or broken.
    """
    from mlx_cm.convert import Options, plan_conversion  # only where something is to be converted

    return plan_conversion(source, Options())


def hub_reference(ref: str | Path) -> hub.HubRef:
    """The Hub repository that a reference which is no path of this machine means.

    Raises:
        ModelError: it cannot be one; the name of a missing file among them.
    """
    hub_ref = hub.parse_ref(str(ref))
    if hub_ref is None or Path(str(ref)).suffix.lower() in FILE_SUFFIXES:
        raise ModelError(str(ref), "no such file or folder, and not a Hub id (owner/name[@revision])")
    return hub_ref


def _download(ref: hub.HubRef, variant: str | None, progress: Progress | None) -> hub.Snapshot:
    from mlx_cm.convert.readers import choose_weight_files  # what is fetched is what is read

    def choose(files: Sequence[hub.RepoFile]) -> list[str]:
        return hub.choose_files(files, variant, choose_weight_files)

    return hub.download(ref, choose=choose, progress=progress)


def _from_hub(ref: hub.HubRef, variant: str | None, progress: Progress | None) -> Path:
    snapshot = _download(ref, variant, progress)
    if is_native(snapshot.path):
        return snapshot.path
    options = {
        "source": snapshot.repo_id,
        "revision": snapshot.revision,
        "preset": preset_of_repository(snapshot.repo_id),
        "variant": variant,
    }
    return _converted(snapshot.path, cache.hub_entry(snapshot.repo_id, snapshot.revision, variant), options, progress)


def _converted(source: Path, entry: Path, options: dict[str, Any], progress: Progress | None) -> Path:
    from mlx_cm.convert import Options, convert  # only where something is to be converted

    with cache.conversion_lock(entry):
        if not (entry / MODEL_INDEX).is_file():
            report = convert(source, entry, Options(progress=progress, overwrite=True, **options))
            for note in report.notes:
                log.warning("%s: %s", source, note)
    return entry


def _has_native_weights(folder: Path) -> bool:
    first = weight_files(folder)[0]
    return first.is_file() and check_safetensors(first).get("format") == WEIGHTS_METADATA["format"]


def _load_pixel(
    folder: Path, index: ModelIndex, dtype: str | None, quantize: int | None, lora: Sequence[str]
) -> ConsistencyModelPipeline:
    for name, value in {"quantize": quantize, "lora": lora}.items():
        if value:
            raise UsageError(name, "pixel-space consistency models are used as they are")
    return ConsistencyModelPipeline(
        backbone=load_model(folder / "unet", dtype),
        schedule=read_schedule(folder / "scheduler"),
        settings=config_from_dict(PixelSettings, index.sampler, str(folder / MODEL_INDEX)),
        provenance=index.provenance | {"weights": index.weights},
    )


PIPELINES = {"ConsistencyModelPipeline": _load_pixel}
