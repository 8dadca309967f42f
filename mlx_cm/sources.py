"""From a reference to files of our own: paths, Hub ids, and what is foreign converted once into the cache.

The one place where foreign checkpoints meet the runtime; `mlx_cm.convert` is imported only where there is one.
"""

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import mlx.core as mx

from mlx_cm import cache, hub
from mlx_cm.bundled import local_path
from mlx_cm.errors import ModelError, NetworkError, UsageError
from mlx_cm.lora import Adapter
from mlx_cm.model_folder import MODEL_INDEX, WEIGHTS_METADATA, is_native, read_model_index, resolve_dtype, weight_files
from mlx_cm.presets import preset_of_repository
from mlx_cm.storage import check_free, check_safetensors

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
    path = local_path(ref)
    variant = "fp16" if resolve_dtype(dtype) == mx.float16 else None
    if not path.exists():
        return _from_hub(hub_reference(ref), variant, base, progress)
    if is_native(path):
        return _whole(path, base)
    return _from_path(path, variant, base, progress)


def convert_ref(
    source: str | Path,
    destination: Path,
    *,
    base: str | Path | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Any:
    """Converts a file, a folder or a Hub repository to a native model folder of the user's own.

    Args:
        base: for a source that is no whole model, a folder or Hub id that has the rest; None: what a lone U-Net's card
            says.
        options: the others of `mlx_cm.convert.Options`.

    Returns:
        The `Report` of `mlx_cm.convert.convert`.

    Raises:
        As `mlx_cm.convert.convert` and `mlx_cm.hub.download`.
    """
    check_free(destination, options.get("overwrite", False))  # before anything is fetched
    path = Path(source).expanduser()
    if not path.exists():
        snapshot = _download(hub_reference(source), options.get("variant"), progress)
        path, origin = snapshot.path, _origin(snapshot)
        options = {**origin, **options, "preset": options.get("preset") or origin["preset"]}
    return _convert(path, destination, base, progress, **options)


def export_ref(source: str | Path, destination: Path, *, overwrite: bool = False) -> Path:
    """Writes a model, as for `native_folder`, as a folder that diffusers reads.

    Raises:
        As `native_folder` and `mlx_cm.convert.export`.
    """
    from mlx_cm.convert import export  # only where something is to be exported

    return export(native_folder(source), destination, overwrite=overwrite)


def plan_ref(source: Path) -> Any:
    """What a conversion of a file or folder would do; reads headers only.

    Returns:
        The `Plan` of `mlx_cm.convert`.

    Raises:
        ModelError: unknown or broken.
    """
    from mlx_cm.convert import Options, plan_conversion  # only where something is to be converted

    return plan_conversion(source, Options())


def adapter_summary(source: Path) -> dict[str, Any] | None:
    """What a LoRA is, without a model for it; None for anything else. See `mlx_cm.convert.describe_adapter`."""
    from mlx_cm.convert import describe_adapter  # only where a foreign file is looked at

    return describe_adapter(source)


def hub_reference(ref: str | Path) -> hub.HubRef:
    """The Hub repository that a reference which is no path of this machine means.

    Raises:
        ModelError: it cannot be one; the name of a missing file among them.
    """
    hub_ref = hub.parse_ref(str(ref))
    if hub_ref is None or Path(str(ref)).suffix.lower() in FILE_SUFFIXES:
        raise ModelError(str(ref), "no such file or folder, and not a Hub id (owner/name[@revision])")
    return hub_ref


def component_folder(ref: str | Path, progress: Progress | None = None, *, part: str | None = None) -> Path:
    """The native folder of one component, downloaded and converted where needed.

    Args:
        ref: a component by itself, native or foreign; or a model that has it.
        part: which component of a model that has several, as "vae"; where it has none such, the first.

    Raises:
        ModelError: not found, broken, or of an unknown class.
    """
    path = local_path(ref)
    if not path.exists():
        folder = _from_hub(hub_reference(ref), None, None, progress, component=True)
    elif is_native(path) or is_native_component(path):
        folder = path
    else:
        folder = _from_path(path, None, None, progress, component=True)
    if not is_native(folder):
        return folder
    names = [name for name in read_model_index(folder).components if (folder / name / "config.json").is_file()]
    return folder / (part if part in names else names[0])


def _download(
    ref: hub.HubRef,
    variant: str | None,
    progress: Progress | None,
    *,
    parts: Sequence[str] | None = None,
    made: Callable[[hub.Snapshot], bool] | None = None,
) -> hub.Snapshot:
    """A repository's files.

    Args:
        parts: the folders of a pipeline that are needed; None: all.
        made: whether what the files are wanted for is there already.
    """
    from mlx_cm.convert.readers import choose_weight_files  # what is fetched is what is read

    def choose(files: Sequence[hub.RepoFile]) -> list[str]:
        names = hub.choose_files(files, variant, choose_weight_files)
        return [name for name in names if parts is None or name.partition("/")[0] in (MODEL_INDEX, *parts)]

    return hub.download(ref, choose=choose, progress=progress, made=made)


def _from_hub(
    ref: hub.HubRef,
    variant: str | None,
    base: str | Path | None,
    progress: Progress | None,
    *,
    component: bool = False,
) -> Path:
    def entry_of(snapshot: hub.Snapshot) -> Path:
        used = _used_variant(variant, snapshot.files)
        return _entry(cache.hub_entry(snapshot.repo_id, snapshot.revision, used), base, component)

    snapshot = _download(ref, variant, progress, made=lambda found: _is_made(entry_of(found)))
    entry = entry_of(snapshot)
    if not _is_made(entry):  # otherwise the snapshot may be gone
        if is_native(snapshot.path):
            return _whole(snapshot.path, base)
        if component and is_native_component(snapshot.path):
            return snapshot.path
    used = _used_variant(variant, snapshot.files)
    return _converted(snapshot.path, entry, base, progress, variant=used, component=component, **_origin(snapshot))


def _from_path(
    path: Path, variant: str | None, base: str | Path | None, progress: Progress | None, *, component: bool = False
) -> Path:
    used = _used_variant(variant, [file.name for file in path.rglob("*")])  # of a file: none
    entry = _entry(cache.local_entry(path, used), base, component)
    return _converted(path, entry, base, progress, variant=used, component=component)


def _whole(folder: Path, base: str | Path | None) -> Path:
    if base is not None:
        raise UsageError("base", f"{folder} is a whole model already")
    return folder


def _origin(snapshot: hub.Snapshot) -> dict[str, Any]:
    """What is known of a download, as options of a conversion."""
    preset = preset_of_repository(snapshot.repo_id)
    return {"source": snapshot.repo_id, "revision": snapshot.revision, "preset": preset}


def _used_variant(variant: str | None, names: Sequence[str]) -> str | None:
    """The variant, where any of the files is of it; so that a model without it is not converted twice."""
    from mlx_cm.convert.readers import variant_of

    return variant if any(variant_of(PurePosixPath(name).name) == variant for name in names) else None


def _entry(entry: Path, base: str | Path | None, component: bool) -> Path:
    """Where a conversion lies that differs from the usual one of its source by its base, or by being a part."""
    if component:
        return entry.with_name(f"{entry.name}+component")
    if base is None:
        return entry
    path = Path(base).expanduser()
    meant = cache.local_entry(path).name if path.exists() else str(base)
    return entry.with_name(f"{entry.name}+{hashlib.sha256(meant.encode()).hexdigest()[:12]}")


def _is_made(entry: Path) -> bool:
    return (entry / MODEL_INDEX).is_file()


def _converted(path: Path, entry: Path, base: str | Path | None, progress: Progress | None, **options: Any) -> Path:
    """The entry of the cache, made where it is missing, by one process at a time."""
    if _is_made(entry):
        return entry
    with cache.conversion_lock(entry):
        if not _is_made(entry):
            cache.remove_leftovers(entry)
            report = _convert(path, entry, base, progress, overwrite=True, **options)
            for note in report.notes:
                log.warning("%s: %s", options.get("source") or path, note)
    return entry


def _convert(path: Path, destination: Path, base: str | Path | None, progress: Progress | None, **options: Any) -> Any:
    """Converts, with those parts of the base that the source at `path` lacks.

    Raises:
        UsageError: there is a base and nothing is missing.
    """
    from mlx_cm.convert import MissingParts, Options, convert, plan_conversion  # only where something is foreign

    wanted = Options(progress=progress, **options)
    missing = None
    try:
        plan_conversion(path, wanted)
    except MissingParts as error:
        missing = error
    if missing is None and base is not None:
        raise UsageError("base", f"{wanted.source or path} is complete without it")
    if missing is not None:
        found, name = _find_base(path, base, missing, wanted.variant, progress)
        wanted = replace(wanted, base=found, base_source=name)
    return convert(path, destination, wanted)


def _find_base(
    source: Path, base: str | Path | None, missing: Any, variant: str | None, progress: Progress | None
) -> tuple[Path, str]:
    """The folder of a base that has what is missing, and what to call it.

    Args:
        missing: the `MissingParts`, which is raised where there is no base.
    """
    card = _base_of_card(source) if base is None else None
    if base is None and card is None:
        raise missing
    path = Path(base or card).expanduser()
    if base is not None and path.exists():
        return path, path.name
    ref = hub_reference(base or card)
    try:
        return _download(ref, variant, progress, parts=missing.parts).path, str(ref)
    except NetworkError as error:
        if card is None:
            raise
        why = f"{error.why}; {missing.what} names it as its base"
        raise NetworkError(error.what, why, "pass --base with a copy of it that you have access to") from error


def _base_of_card(source: Path) -> str | None:
    """The model that a lone U-Net's card names as its base."""
    from mlx_cm.convert import base_model_of_card

    card = source / "README.md"
    if (source / MODEL_INDEX).is_file() or not (source / "config.json").is_file() or not card.is_file():
        return None
    return base_model_of_card(card.read_text(encoding="utf-8", errors="replace"))


def is_native_component(folder: Path) -> bool:
    """Whether a folder is a component with weights in native layout."""
    if not (folder / "config.json").is_file():
        return False
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


def save_adapter(adapter: Adapter, folder: Path) -> Path:
    """Writes a LoRA in kohya's spelling and, in a folder inside, in peft's; see `mlx_cm.convert.write_adapter`."""
    from mlx_cm.convert import write_adapter  # only where something foreign is written

    return write_adapter(adapter, folder)
