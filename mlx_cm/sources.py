"""From a reference to files of our own: paths, Hub ids, and what is foreign converted once into the cache.

The one place where foreign checkpoints meet the runtime; `mlx_cm.convert` is imported only where there is one.
"""

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_cm import cache, hub
from mlx_cm.errors import ModelError, UsageError
from mlx_cm.lora import Adapter
from mlx_cm.model_folder import MODEL_INDEX, WEIGHTS_METADATA, is_native, read_model_index, resolve_dtype, weight_files
from mlx_cm.presets import preset_of_repository
from mlx_cm.storage import check_safetensors

log = logging.getLogger("mlx_cm")

# The published adapters do not say in their files which sampler they were distilled for.
ADAPTER_SAMPLERS = {
    "latent-consistency/lcm-lora-sdv1-5": "lcm",
    "latent-consistency/lcm-lora-sdxl": "lcm",
    "latent-consistency/lcm-lora-ssd-1b": "lcm",
    "h1t/TCD-SD15-LoRA": "tcd",
    "h1t/TCD-SD21-base-LoRA": "tcd",
    "h1t/TCD-SDXL-LoRA": "tcd",
}
# A reference that ends so is a file's path, not a Hub id, even where there is no such file.
FILE_SUFFIXES = {".safetensors", ".pt", ".pth", ".ckpt", ".bin", ".pkl", ".png", ".jpg", ".jpeg", ".webp", ".json"}

Progress = Callable[[int, int, str], None]  # (bytes done, bytes in all, what)


def native_folder(
    ref: str | Path, *, dtype: str | None = None, base: str | Path | None = None, progress: Progress | None = None
) -> Path:
    """The native model folder that a reference stands for, downloaded and converted where needed.

    Raises:
        ModelError: the reference is neither a path that exists nor a Hub id; or as for `load`.
    """
    path = Path(ref).expanduser()
    variant = "fp16" if resolve_dtype(dtype) == mx.float16 else None
    if not path.exists():
        return _from_hub(hub_reference(ref), variant, base, progress)
    if path.is_dir() and is_native(path):
        if base is not None:
            raise UsageError("base", f"{path} is a whole model already")
        return path
    options = {"variant": variant, **_base_options(base, dtype, progress)}
    return _converted(path, _for_base(cache.local_entry(path), base), options, progress)


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


def component_folder(ref: str | Path, progress: Progress | None = None) -> Path:
    """The native folder of one component (`unet/`), downloaded and converted where needed.

    Raises:
        ModelError: not found, broken, or of an unknown class.
    """
    path = Path(ref).expanduser()
    if not path.exists():
        folder = _from_hub(hub_reference(ref), None, None, progress, component=True)
    elif (path / "config.json").is_file() and is_native_component(path):
        return path
    else:
        folder = _converted(path, cache.local_entry(path), {"component": True}, progress)
    index = read_model_index(folder)
    return folder / next(name for name in index.components if (folder / name / "config.json").is_file())


def _download(ref: hub.HubRef, variant: str | None, progress: Progress | None) -> hub.Snapshot:
    from mlx_cm.convert.readers import choose_weight_files  # what is fetched is what is read

    def choose(files: Sequence[hub.RepoFile]) -> list[str]:
        return hub.choose_files(files, variant, choose_weight_files)

    return hub.download(ref, choose=choose, progress=progress)


def _from_hub(
    ref: hub.HubRef, variant: str | None, base: str | Path | None, progress: Progress | None, **options: Any
) -> Path:
    snapshot = _download(ref, variant, progress)
    if is_native(snapshot.path):
        return snapshot.path
    entry = _for_base(cache.hub_entry(snapshot.repo_id, snapshot.revision, variant), base)
    if (entry / MODEL_INDEX).is_file():
        return entry
    if base is None and not options.get("component"):
        base = _base_of_card(snapshot.path)
    options |= {
        "source": snapshot.repo_id,
        "revision": snapshot.revision,
        "preset": preset_of_repository(snapshot.repo_id),
        "variant": variant,
        **_base_options(base, "float16" if variant == "fp16" else None, progress),
    }
    return _converted(snapshot.path, entry, options, progress)


def _base_of_card(snapshot: Path) -> str | None:
    """The model that a lone U-Net's card names as its base."""
    from mlx_cm.convert import base_model_of_card

    card = snapshot / "README.md"
    if (snapshot / MODEL_INDEX).is_file() or not (snapshot / "config.json").is_file() or not card.is_file():
        return None
    return base_model_of_card(card.read_text(encoding="utf-8", errors="replace"))


def _base_options(base: str | Path | None, dtype: str | None, progress: Progress | None) -> dict[str, Any]:
    if base is None:
        return {}
    path = Path(base).expanduser()
    folder = path if path.exists() else native_folder(base, dtype=dtype, progress=progress)
    return {"base": folder, "base_source": path.name if path.exists() else str(base)}


def _for_base(entry: Path, base: str | Path | None) -> Path:
    """Parts of another base make another model."""
    return entry if base is None else entry.with_name(f"{entry.name}+{re.sub(r'[^0-9A-Za-z.-]+', '--', str(base))}")


def _converted(source: Path, entry: Path, options: dict[str, Any], progress: Progress | None) -> Path:
    from mlx_cm.convert import Options, convert  # only where something is to be converted

    with cache.conversion_lock(entry):
        if not (entry / MODEL_INDEX).is_file():
            report = convert(source, entry, Options(progress=progress, overwrite=True, **options))
            for note in report.notes:
                log.warning("%s: %s", source, note)
    return entry


def is_native_component(folder: Path) -> bool:
    """Whether a component folder holds weights in native layout."""
    first = weight_files(folder)[0]
    return first.is_file() and check_safetensors(first).get("format") == WEIGHTS_METADATA["format"]


def open_adapter(
    ref: str,
    modules: Mapping[str, Mapping[str, tuple[int, ...]]],
    progress: Progress | None = None,
    *,
    partial: bool = False,
) -> Adapter:
    """A LoRA of this machine or the Hub, matched with a model's modules.

    Args:
        modules: component => module path => shape of its weight.
        partial: leave out, with a warning, the modules that the model has not.

    Raises:
        ModelError: not found, broken, or made for another model.
    """
    from mlx_cm.convert import load_adapter  # only where there is an adapter

    path = Path(ref).expanduser()
    if path.exists():
        return load_adapter(path, modules, name=path.name, partial=partial)
    hub_ref = hub_reference(ref)
    adapter = load_adapter(_download(hub_ref, None, progress).path, modules, name=ref, partial=partial)
    return replace(adapter, ref=ref, sampler=adapter.sampler or ADAPTER_SAMPLERS.get(hub_ref.repo_id))
