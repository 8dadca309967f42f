"""What latent models train on, computed once: latents of pictures and features of captions, cached on disk.

    <root>/latents-<model>/<name>.safetensors     `<picture>.mean` and `<picture>.std`, for some pictures
    <root>/prompts-<model>/<name>.safetensors     `<caption>.states` and `<caption>.pooled`, for some captions
    <root>/prepared/<name>.json                   which pixels the files of a data set were prepared to

Features are known by the SHA-256 of what they are computed from, the prepared pixels or the caption's text, and by what
computes them. So they are shared between data sets, none is computed twice, and a changed picture or model has others.
A file is written once and never changed; an interruption costs those features that were not in a file yet.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_cm.cache import cache_root
from mlx_cm.errors import OutputError, UsageError
from mlx_cm.training.data import PictureData, Progress, augmentation_draws, check_order, parallel, target_sizes
from mlx_cm.training.data_sources import Entry
from mlx_cm.training.feature_store import FeatureStore, Item
from mlx_cm.training.order import Order, Purpose, random_bits
from mlx_cm.training.preparation import DataSettings, Size, micro_conditioning, prepare, to_unit
from mlx_cm.training.remembered import Remembered

log = logging.getLogger("mlx_cm")

EncodePictures = Callable[[mx.array], tuple[mx.array, mx.array | None]]  # (B, H, W, 3) => scaled mean and deviation
EncodePrompts = Callable[[list[str]], tuple[mx.array, mx.array | None]]  # => states (B, T, D), pooled (B, P)
Tokenize = Callable[[list[str]], Sequence[mx.array]]  # => ids (B, L) of each tokenizer

# Crops and flips of a picture's variants: steps that spread them evenly however many there are, flips in turn.
# The first two are the inverse powers of the plastic number (Roberts: The unreasonable effectiveness of quasirandom
# sequences, 2018).
VARIANT_STRIDES = np.array([0.7548776662466927, 0.5698402909980532, 0.5])


class LatentBatches:
    """The latents and the text of every step, computed once when this is made; nothing is computed in `load`.

    The encoders are not needed afterwards.

    Args:
        data: the pictures; one without a caption has the empty one.
        order: which pictures a step has; of one bucket each, see `data.make_order`.
        settings: how pictures are prepared; the size filled in.
        seed: of the choice between variants.
        encode_pictures: pixels (B, H, W, 3) in [-1, 1] => mean and standard deviation of scaled latents; None for the
            latter where the autoencoder has none.
        picture_model: identifies what encodes pictures: weights, dtype and whatever else changes the result.
        encode_prompts: texts => states (B, T, D) and pooled (B, P) or None; or
        tokenize: texts => ids (B, L), one array for each tokenizer, where text encoders are trained too. One of the two
            is given.
        prompt_model: identifies what encodes prompts.
        prompts: texts that are encoded beside the captions, for `prompt_rows`.
        with_time_ids: whether rows tell size and crop, as SDXL wants.
        root: folder of the features; by default of mlx-cm's cache.
        batch_size: how many pictures or prompts are encoded at once; above one the features may round differently.
        progress: called for each picture variant and each text.

    Raises:
        UsageError: both or none of `encode_prompts` and `tokenize`, or an order that does not fit.
        ModelError: a picture has become unreadable since the data was opened.
        OutputError: an encoder's result is not finite.
        DiskError: the features cannot be written.
    """

    def __init__(
        self,
        data: PictureData,
        order: Order,
        settings: DataSettings,
        seed: int = 0,
        *,
        encode_pictures: EncodePictures,
        picture_model: str,
        encode_prompts: EncodePrompts | None = None,
        tokenize: Tokenize | None = None,
        prompt_model: str = "",
        prompts: Sequence[str] = ("",),
        with_time_ids: bool = False,
        root: Path | None = None,
        batch_size: int = 1,
        progress: Progress | None = None,
    ):
        if (encode_prompts is None) == (tokenize is None):
            raise UsageError("latent batches", "expected either encode_prompts or tokenize")
        if settings.variants == 1 and (settings.flip or settings.crop == "random"):
            log.warning("each picture is cropped and flipped in one way only; set data.variants to encode several")
        self.data, self.order, self.settings, self.seed = data, order, settings, seed
        self.with_time_ids = with_time_ids
        root = Path(root or cache_root() / "features")
        self._targets = target_sizes(data, settings)
        check_order(order, self._targets)
        self._captions = [caption or "" for caption in data.captions]
        texts = sorted({*self._captions, *prompts})
        report = _Report(progress, len(data) * settings.distinct_variants + (len(texts) if encode_prompts else 0))

        self._latents = FeatureStore(root / f"latents-{_short_hash(picture_model)}")
        self._variants = _encode_variants(
            self._latents, data, settings, self._targets, encode_pictures, root, batch_size, report
        )
        self._texts: FeatureStore | None = None
        self._ids: dict[str, list[np.ndarray]] = {}
        if tokenize is not None:
            ids = [np.array(rows, dtype=np.int32) for rows in tokenize(texts)]
            self._ids = {text: [rows[number] for rows in ids] for number, text in enumerate(texts)}
        else:
            self._texts = FeatureStore(root / f"prompts-{_short_hash(prompt_model)}")
            self._texts.fill(
                (Item(_text_key(text), f"prompt {text!r:.60}", text) for text in texts),
                functools.partial(_encode_texts, encode_prompts),
                batch_size,
                report,
            )

    def load(self, step: int, start: int = 0, stop: int | None = None) -> dict[str, mx.array]:
        """Rows [start, stop) of a step's batch.

        Returns:
            `mean`, `std`: float32, (B, h, w, c), of scaled latents; the rows of `prompt_rows` for the captions; and
            `time_ids`, float32, (B, 6), where asked for.

        Raises:
            ModelError: cached features were removed meanwhile.
        """
        stop = self.order.checked_stop(start, stop)
        indices = self.order.batch(step)[start:stop]
        draws = augmentation_draws(self.seed, step, stop)[start:, 0]
        variants = (draws * self.settings.distinct_variants).astype(int).tolist()
        features = [
            self._latents.read(self._variants[index][variant]) for index, variant in zip(indices, variants, strict=True)
        ]
        rows = {
            "mean": np.stack([row["mean"] for row in features]),
            "std": np.stack([row["std"] if "std" in row else np.zeros_like(row["mean"]) for row in features]),
        }
        if self.with_time_ids:
            ids = [self._time_ids(index, variant) for index, variant in zip(indices, variants, strict=True)]
            rows["time_ids"] = np.array(ids, dtype=np.float32)
        texts = self.prompt_rows([self._captions[index] for index in indices])
        return {name: mx.array(array) for name, array in rows.items()} | texts

    def prompt_rows(self, texts: Sequence[str]) -> dict[str, mx.array]:
        """Rows for captions of the data or for `prompts`.

        Returns:
            `states`, (B, T, D), and where the encoders give it `pooled`, (B, P), in float16 or float32; or with
            `tokenize` the ids of each tokenizer, int32, (B, L), as `ids`, `ids_2`, ...

        Raises:
            UsageError: a text that is neither.
        """
        try:
            if self._texts is None:
                of_each = zip(*(self._ids[text] for text in texts), strict=True)
                return {name: mx.array(np.stack(rows)) for name, rows in zip(_id_names(), of_each, strict=False)}
            features = [self._texts.read(_text_key(text)) for text in texts]
        except KeyError:
            raise UsageError("prompt", "was not encoded: it is no caption of the data") from None
        return {part: mx.array(np.stack([row[part] for row in features])) for part in features[0]}

    def _time_ids(self, index: int, variant: int) -> tuple[int, ...]:
        draws = variant_draws(self.data.entries[index].name, variant)
        return micro_conditioning(self.data.sizes[index], self._targets[index], self.settings, draws)


# --- pictures


def variant_draws(name: str, variant: int) -> np.ndarray:
    """Three uniform numbers in [0, 1) that decide a variant's crop and flip.

    They depend on the picture's name only: neither another seed nor another picture beside it makes the features anew.
    """
    seed = int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8], "little")
    first = np.random.Generator(random_bits(seed, Purpose.VARIANTS, 0)).random(3)
    return (first + variant * VARIANT_STRIDES) % 1


def _encode_variants(
    store: FeatureStore,
    data: PictureData,
    settings: DataSettings,
    targets: Sequence[Size],
    encode: EncodePictures,
    root: Path,
    batch_size: int,
    report: Callable[[str], None],
) -> list[list[str]]:
    """Fills the store with every variant of every picture; returns their keys.

    The keys of files that have not changed are remembered, so that a later run decodes nothing.
    """
    how = json.dumps([os.fsencode(data.path.resolve()).hex(), settings.crop, settings.flip])
    remembered = Remembered(root / "prepared" / f"{_short_hash(how)}.json")
    keys = [
        _known_keys(remembered, entry, target, settings.distinct_variants)
        for entry, target in zip(data.entries, targets, strict=True)
    ]
    missing = []
    for index, entry in enumerate(data.entries):
        for variant in range(settings.distinct_variants):
            if keys[index][variant] in store:
                report(entry.name)
            else:
                missing.append((index, variant))

    def prepared(place: tuple[int, int]) -> Item:
        index, variant = place
        name = data.entries[index].name
        pixels = prepare(data.read(index), settings, variant_draws(name, variant), target=targets[index])
        return Item(_picture_key(pixels), name, pixels)

    def items(results: Iterable[Item]) -> Iterator[Item]:
        for (index, variant), item in zip(missing, results, strict=True):
            keys[index][variant] = item.key
            yield item

    try:
        with contextlib.closing(parallel(prepared, missing, settings.workers)) as results:
            store.fill(items(results), functools.partial(_encode_pixels, encode), batch_size, report)
    finally:
        for entry, target, known in zip(data.entries, targets, keys, strict=True):
            if None not in known:
                remembered.put(entry.name, entry.stamp, [*target, *known])
        remembered.save()
    return keys


def _known_keys(remembered: Remembered, entry: Entry, target: Size, variants: int) -> list[str | None]:
    """The keys of a picture's variants, None for those to be found out; more than are needed stay remembered."""
    match remembered.get(entry.name, entry.stamp):
        case [height, width, *known] if (height, width) == target and all(isinstance(key, str) for key in known):
            return known + [None] * (variants - len(known))
    return [None] * variants


def _picture_key(pixels: np.ndarray) -> str:
    return hashlib.sha256(f"{pixels.shape} ".encode() + pixels.tobytes()).hexdigest()


def _encode_pixels(encode: EncodePictures, items: Sequence[Item]) -> list[dict[str, np.ndarray]]:
    mean, std = encode(mx.array(to_unit(np.stack([item.content for item in items]))))
    parts = {"mean": np.array(mean.astype(mx.float32))}
    if std is not None and bool(mx.any(std != 0)):
        parts["std"] = np.array(std.astype(mx.float32))
    return _rows(parts, items)


# --- text


def _text_key(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _encode_texts(encode: EncodePrompts, items: Sequence[Item]) -> list[dict[str, np.ndarray]]:
    states, pooled = encode([item.content for item in items])
    parts = {"states": _to_numpy(states)}
    if pooled is not None:
        parts["pooled"] = _to_numpy(pooled)
    return _rows(parts, items)


def _to_numpy(array: mx.array) -> np.ndarray:
    """NumPy has no bfloat16; float32 holds the same numbers."""
    return np.array(array.astype(mx.float32) if array.dtype == mx.bfloat16 else array)


def _id_names() -> Iterator[str]:
    """`ids`, `ids_2`, ..., as text encoders are named."""
    return itertools.chain(["ids"], (f"ids_{number}" for number in itertools.count(2)))


# --- both


def _rows(parts: dict[str, np.ndarray], items: Sequence[Item]) -> list[dict[str, np.ndarray]]:
    """The features of each item, which must be finite."""
    for number, item in enumerate(items):
        if not all(np.isfinite(array[number]).all() for array in parts.values()):
            raise OutputError(
                f"features of {item.name}", "are not finite", "encode in float32; some encoders overflow in float16"
            )
    return [{part: array[number] for part, array in parts.items()} for number in range(len(items))]


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class _Report:
    """Counts for a progress callback."""

    def __init__(self, progress: Progress | None, total: int):
        self.progress, self.total, self.count = progress, total, 0

    def __call__(self, name: str) -> None:
        self.count += 1
        if self.progress:
            self.progress(self.count, self.total, name)
