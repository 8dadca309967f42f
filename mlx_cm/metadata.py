"""What an image says about itself: the recipe that makes it again, and the settings in the layout other tools read.

A recipe is a JSON object headed by `"program": "mlx-cm"` and `"schema": 1`. Beside it travels the `parameters` text of
AUTOMATIC1111's web UI, which most tools of that family show. Where the two live:

    PNG         an iTXt chunk `mlx-cm`; a text chunk `parameters`
    JPEG, WebP  EXIF ImageDescription, as ASCII JSON; EXIF UserComment, as UTF-16BE after `UNICODE`

Nothing in a file that was read is trusted: size, depth, types and numbers are checked before a value is used.
"""

import contextlib
import json
import math
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from mlx_cm import __version__
from mlx_cm.errors import MlxCmError, ModelError, UsageError
from mlx_cm.storage import atomic_file, read_json, write_json

PROGRAM = "mlx-cm"
SCHEMA = 1

RECIPE_KEY = "mlx-cm"
PARAMETERS_KEY = "parameters"

MAX_RECIPE_BYTES = 1 << 20
MAX_SIDECAR_BYTES = 16 << 20  # indented, a recipe is longer than when embedded
MAX_DEPTH = 32
MAX_PIXELS = 64_000_000
MAX_JPEG_EXIF_BYTES = 65_533  # what the 16-bit length of a JPEG segment leaves

# Pillow's other decoders are not let near a file from outside: one of them starts Ghostscript.
READABLE_FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF")

_UNICODE_PREFIX = b"UNICODE\0"
_ASCII_PREFIX = b"ASCII\0\0\0"

# Recipe keys and the labels of AUTOMATIC1111's web UI, in its order.
_PARAMETER_LABELS = {
    "steps": "Steps",
    "sampler": "Sampler",
    "guidance_scale": "CFG scale",
    "seed": "Seed",
    "size": "Size",
    "model_sha256": "Model hash",
    "model": "Model",
    "strength": "Denoising strength",
    "rng": "RNG",
    "version": "Version",
}
_SAMPLER_LABELS = {"lcm": "LCM", "tcd": "TCD", "ctm": "CTM", "ddim": "DDIM"}
_RNG_LABELS = {"torch": "CPU"}  # the web UI's name for the same generator; it has none for another


# --- the recipe


def new_recipe(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe of these settings, headed by program, schema and version.

    Raises:
        UsageError: a value JSON cannot hold, or too much of it.
    """
    header = {"program": PROGRAM, "schema": SCHEMA, "version": __version__}
    recipe = header | dict(settings) | header
    encode_recipe(recipe)
    return recipe


def encode_recipe(recipe: Mapping[str, Any]) -> str:
    """The recipe as ASCII JSON; equal recipes with keys in the same order give equal text.

    Raises:
        UsageError: no recipe of this schema, a value JSON cannot hold, or more than 1 MiB.
    """
    fault = recipe_fault(recipe)
    if fault:
        raise UsageError("recipe", fault)
    text = json.dumps(recipe, allow_nan=False, separators=(",", ":"))
    if len(text) > MAX_RECIPE_BYTES:
        raise UsageError("recipe", f"is {len(text)} bytes long, at most {MAX_RECIPE_BYTES} are allowed")
    return text


def recipe_fault(recipe: Any) -> str | None:
    """What keeps a value from being a recipe that this version understands; None where nothing does."""
    if not isinstance(recipe, dict) or recipe.get("program") != PROGRAM:
        return "carries no mlx-cm recipe"
    schema = recipe.get("schema")
    if type(schema) is not int or schema < 1:
        return f"the recipe's schema is {schema!r:.40}, expected {SCHEMA}"
    if schema > SCHEMA:
        return f"the recipe has schema {schema}, this version of mlx-cm reads up to {SCHEMA}; update mlx-cm"
    return _plain_fault(recipe, "recipe", MAX_DEPTH)


def _plain_fault(value: Any, where: str, depth: int) -> str | None:
    """Names the first thing inside `value` that does not come back from JSON as it went in."""
    if depth == 0:
        return f"{where:.80} is nested deeper than {MAX_DEPTH} levels"
    if value is None or isinstance(value, (bool, int)):
        return None
    if isinstance(value, float):
        return None if math.isfinite(value) else f"{where:.80} is {value}, expected a finite number"
    if isinstance(value, str):
        return None if _is_unicode(value) else f"{where:.80} is not valid Unicode text"
    if isinstance(value, dict):
        names = next((name for name in value if not isinstance(name, str) or not _is_unicode(name)), None)
        if names is not None:
            return f"{where:.80} has the key {names!r:.40}, expected text"
        items = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    else:
        return f"{where:.80} is a {type(value).__name__}, expected plain JSON values"
    faults = (_plain_fault(item, f"{where}.{name}", depth - 1) for name, item in items)
    return next((fault for fault in faults if fault), None)


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # half of a surrogate pair, as in arguments that are not UTF-8
        return False
    return True


# --- the parameters text


def format_parameters(recipe: Mapping[str, Any]) -> str:
    """The recipe's settings in the layout of AUTOMATIC1111's web UI.

    Used are, where present: `prompt` (or `label` of a class-conditional model), `negative_prompt`, `steps`, `sampler`,
    `guidance_scale`, `seed`, `width` and `height`, `model_sha256`, `model`, `strength`, `rng`, `version`.
    """
    prompt = str(recipe.get("prompt") or "")
    if not prompt and recipe.get("label") is not None:
        prompt = f"class {recipe['label']}"
    lines = [prompt]
    if recipe.get("negative_prompt"):
        lines.append(f"Negative prompt: {recipe['negative_prompt']}")
    settings = {**recipe, **_derived_settings(recipe)}
    lines.append(
        ", ".join(
            f"{label}: {_quoted(settings[key])}"
            for key, label in _PARAMETER_LABELS.items()
            if settings.get(key) is not None
        )
    )
    return "\n".join(lines).strip()


def _derived_settings(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Settings which the web UI writes in another form than the recipe."""
    width, height, sampler = recipe.get("width"), recipe.get("height"), recipe.get("sampler")
    return {
        "size": f"{width}x{height}" if width and height else None,
        "sampler": _SAMPLER_LABELS.get(str(sampler), sampler),
        "model_sha256": str(recipe.get("model_sha256") or "")[:10] or None,
        "rng": _RNG_LABELS.get(str(recipe.get("rng"))),
        "version": f"{PROGRAM} {recipe['version']}" if recipe.get("version") else None,
    }


def _quoted(value: Any) -> str:
    """A value that contains a separator is written as a JSON string."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if set(text) & set(",\n:") else text


# --- writing


def _png_options(recipe: str | None, parameters: str | None) -> dict[str, Any]:
    chunks = PngInfo()
    if recipe is not None:
        chunks.add_itxt(RECIPE_KEY, recipe)
    if parameters is not None:
        chunks.add_text(PARAMETERS_KEY, parameters)  # tEXt where Latin-1 can hold it, else iTXt
    return {"pnginfo": chunks}


def _exif_options(recipe: str | None, parameters: str | None) -> dict[str, Any]:
    exif = Image.Exif()
    if recipe is not None:
        exif[ExifTags.Base.ImageDescription] = recipe
    if parameters is not None:
        comment = _UNICODE_PREFIX + parameters.encode("utf-16-be")
        exif[ExifTags.IFD.Exif] = {ExifTags.Base.UserComment: comment}
    return {"exif": exif.tobytes()}


def _jpeg_options(recipe: str | None, parameters: str | None) -> dict[str, Any]:
    options = _exif_options(recipe, parameters)
    if len(options["exif"]) > MAX_JPEG_EXIF_BYTES:
        raise UsageError(
            "metadata",
            f"is {len(options['exif'])} bytes long, a JPEG file holds {MAX_JPEG_EXIF_BYTES}",
            "write png or webp, or use --metadata sidecar",
        )
    return options


# Image format => Pillow's save options for (recipe as JSON, parameters text).
_SAVE_OPTIONS: dict[str, Callable[[str | None, str | None], dict[str, Any]]] = {
    "png": _png_options,
    "jpeg": _jpeg_options,
    "webp": _exif_options,
}


def save_options(format: str, recipe: Mapping[str, Any] | None, parameters: str | None) -> dict[str, Any]:
    """Pillow's save options that embed a recipe and a parameters text; none where there is nothing to embed.

    Args:
        format: `png`, `jpeg` or `webp`.

    Raises:
        UsageError: the recipe or the text is not fit to be written, or too long for the format.
    """
    if recipe is None and parameters is None:
        return {}
    if parameters is not None and not _is_unicode(parameters):
        raise UsageError("parameters", "is not valid Unicode text")
    return _SAVE_OPTIONS[format](None if recipe is None else encode_recipe(recipe), parameters)


def write_sidecar(recipe: Mapping[str, Any], path: Path) -> None:
    """Writes a recipe as a readable `.json` file that `read_recipe` reads.

    Raises:
        UsageError: the recipe is not fit to be written. DiskError: writing fails.
    """
    encode_recipe(recipe)
    with atomic_file(path) as partial:
        write_json(partial, dict(recipe))


# --- reading


class _NoWarnings:
    """Silences warnings while any thread is inside; `warnings.catch_warnings` alone, left by two threads in another
    order than they entered, would leave them silenced."""

    def __init__(self):
        self._lock = threading.Lock()
        self._inside = 0
        self._caught = warnings.catch_warnings()

    def __enter__(self):
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._caught = warnings.catch_warnings()
                self._caught.__enter__()
                warnings.simplefilter("ignore")

    def __exit__(self, *error: Any):
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._caught.__exit__(*error)


_no_warnings = _NoWarnings()


@contextlib.contextmanager
def opened_image(path: Path, file: BinaryIO | None = None) -> Iterator[Image.Image]:
    """Opens an image file from outside; what goes wrong while it is open is an error that names the file.

    Args:
        file: the image's bytes, where they lie inside another file; `path` then only names it.

    Raises:
        ModelError: missing, corrupt, truncated, of an unknown format, or of more than 64 million pixels.
    """
    path = Path(path)
    try:
        # Pillow warns where it guesses; the checks here decide.
        with _no_warnings, Image.open(path if file is None else file, formats=READABLE_FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels")
            yield image
    except MlxCmError:
        raise
    except Image.DecompressionBombError as error:
        limit = f"more than {MAX_PIXELS // 10**6} million pixels are not read"
        raise ModelError(str(path), f"{limit} ({error})", "scale it down first") from None
    except FileNotFoundError:
        raise ModelError(str(path), "file is missing") from None
    except UnidentifiedImageError:
        kinds = ", ".join(READABLE_FORMATS)
        raise ModelError(str(path), f"is no image of a known format ({kinds})", "convert it to PNG") from None
    except Exception as error:  # Pillow's decoders let out whatever a broken file makes them stumble over
        system = getattr(error, "strerror", None)
        reason = f"cannot be read ({system})" if system else f"is truncated or corrupt ({error})"
        raise ModelError(str(path), reason) from None


def read_recipe(path: Path) -> dict[str, Any]:
    """The recipe embedded in an image, or that of a `.json` sidecar.

    Raises:
        ModelError: the file is missing or broken, carries no recipe, or one that is malformed or of a newer schema.
    """
    path = Path(path)
    recipe = _read_sidecar(path) if path.suffix.lower() == ".json" else _decode_recipe(_read_texts(path)[0], path)
    fault = recipe_fault(recipe)
    if fault:
        raise ModelError(str(path), fault)
    return recipe


def read_parameters(path: Path) -> str:
    """The parameters text embedded in an image, by mlx-cm or by another program.

    Raises:
        ModelError: the file is missing or broken, or carries no such text.
    """
    parameters = _read_texts(Path(path))[1]
    if not parameters:
        raise ModelError(str(path), "carries no parameters text")
    return parameters


def _read_sidecar(path: Path) -> dict[str, Any]:
    if path.is_file() and path.stat().st_size > MAX_SIDECAR_BYTES:
        raise ModelError(str(path), f"is {path.stat().st_size} bytes long, too much for a recipe")
    return read_json(path)


def _decode_recipe(text: str | None, path: Path) -> Any:
    if text is None:
        return None
    if len(text) > MAX_RECIPE_BYTES:
        raise ModelError(str(path), f"has {len(text)} characters where a recipe is expected, too much for one")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelError(str(path), f"the recipe is not valid JSON ({error})") from None


def _read_texts(path: Path) -> tuple[str | None, str | None]:
    """What an image carries in the places of (recipe, parameters)."""
    with opened_image(path) as image:
        if image.format == "PNG" and not {RECIPE_KEY, PARAMETERS_KEY} <= image.info.keys():
            image.load()  # other programs put text behind the pixels
        exif = image.getexif()
        recipe = image.info.get(RECIPE_KEY)
        if recipe is None:
            recipe = _json_object(exif.get(ExifTags.Base.ImageDescription))
        parameters = image.info.get(PARAMETERS_KEY)
        if parameters is None:
            parameters = _decode_comment(exif.get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment))
    return recipe, parameters


def _json_object(description: Any) -> str | None:
    """A camera's or a person's description of the image is no broken recipe, only something else."""
    return description if isinstance(description, str) and description.startswith("{") else None


def _decode_comment(comment: Any) -> str | None:
    if not isinstance(comment, bytes):
        return None
    for prefix, encoding in ((_UNICODE_PREFIX, "utf-16-be"), (_ASCII_PREFIX, "ascii")):
        if comment.startswith(prefix):
            return comment.removeprefix(prefix).decode(encoding)
    return None
