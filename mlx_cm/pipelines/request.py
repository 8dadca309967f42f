"""What requests of all pipelines share."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import mlx.core as mx
from PIL import Image

from mlx_cm.bundled import BUNDLED
from mlx_cm.errors import UsageError
from mlx_cm.images import check_output, to_pil
from mlx_cm.rng import NOISE_SOURCES

RequestT = TypeVar("RequestT")


def check_rng(rng: str) -> None:
    """Refuses an unknown noise source."""
    if rng not in NOISE_SOURCES:
        raise UsageError(f"rng {rng!r}", f"expected one of {', '.join(NOISE_SOURCES)}")


def check_eta(sampler: str, eta: float | None, default: float | None) -> float | None:
    """How much noise a sampler puts in again; None where it has no such setting.

    Args:
        sampler: its name.
        eta: asked for; None: the default.
        default: the sampler's own; None: it has no such setting.

    Raises:
        UsageError: outside [0, 1], or given to a sampler that has no such setting.
    """
    if default is None:
        if eta is not None:
            raise UsageError("eta", f"the {sampler} sampler has no such setting")
        return None
    eta = default if eta is None else float(eta)
    if not 0 <= eta <= 1:  # false for NaN too
        raise UsageError(f"eta {eta}", "expected 0 to 1")
    return eta


def split_request(request: RequestT, per_image: Sequence[str], size: int) -> list[RequestT]:
    """The request cut into requests for `size` images each.

    Args:
        per_image: names of the fields that hold one value per image; a field may be None as a whole.

    Raises:
        UsageError: size below 1.
    """
    if size < 1:
        raise UsageError(f"batch_size {size}", "expected at least 1")
    given = {name: getattr(request, name) for name in per_image if getattr(request, name) is not None}
    count = len(next(iter(given.values())))
    return [
        replace(request, **{name: values[start : start + size] for name, values in given.items()})
        for start in range(0, count, size)
    ]


def pictures(
    batches: Sequence[RequestT], per_image: Sequence[str], made: Iterable[mx.array]
) -> Iterator[tuple[RequestT, Image.Image]]:
    """Yields each picture with the request that makes it alone.

    Args:
        made: images of each batch, (B, H, W, C) in [-1, 1]; taken one after the other.

    Raises:
        OutputError: a picture is not finite, or blank.
    """
    for batch, x in zip(batches, made, strict=True):
        images = to_pil(x)
        check_output(images)
        yield from zip(split_request(batch, per_image, 1), images, strict=True)


def refuse_settings(others: dict[str, Any], reasons: dict[str, str]) -> None:
    """Refuses settings that the loaded model has no use for; none is silently dropped.

    Raises:
        UsageError: a setting of another pipeline. TypeError: no setting of any.
    """
    for name, value in others.items():
        if name not in reasons:
            raise TypeError(f"generate() has no setting {name!r}")
        if value is not None:
            raise UsageError(name, f"{reasons[name]}, so the setting would have no effect")


def alone(values: Sequence[Any] | None) -> Any:
    """The value of a request for one image, the list of values for several; JSON's types."""
    return None if values is None else values[0] if len(values) == 1 else list(values)


def told_of_model(provenance: dict[str, Any], weights_sha256: str | None) -> dict[str, Any]:
    """What a recipe says of the model; where it lies on this machine is nobody's business."""
    source, revision = provenance.get("source"), provenance.get("revision")
    ref = f"{source}@{revision}" if revision else source if source == BUNDLED else None
    return {"model": source, "model_ref": ref, "model_sha256": weights_sha256}


def told_of_machine(dtype: mx.Dtype) -> dict[str, Any]:
    """What a recipe says of how the numbers were computed, which decides their last digits."""
    device = mx.default_device().type.name
    return {"dtype": str(dtype).removeprefix("mlx.core."), "mlx": mx.__version__, "device": device}
