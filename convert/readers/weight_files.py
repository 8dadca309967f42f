"""Which files of a component folder hold its weights, by name alone, so that the Hub is asked for those only."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from mlx_cm.errors import ModelError
from mlx_cm.storage import read_json, sibling_file

# In order of preference. Each row: extension, the names before it.
STEMS = (
    ("safetensors", ("diffusion_pytorch_model", "model", "pytorch_lora_weights", "adapter_model")),
    ("bin", ("diffusion_pytorch_model", "pytorch_model", "pytorch_lora_weights", "adapter_model")),
)

# How variants are spelt, {stem}.{variant}.{extension} being "model.fp16.safetensors". Libraries have spelt the index
# of a sharded variant in three ways and its shards in two.
SINGLE = "{stem}.{extension}"
INDEX = "{stem}.{extension}.index.json"
SHARD = r"{stem}-\d{{5}}-of-\d{{5}}\.{extension}"
VARIANT_SINGLE = "{stem}.{variant}.{extension}"
VARIANT_INDICES = (
    "{stem}.{extension}.index.{variant}.json",
    "{stem}.{extension}.{variant}.index.json",
    "{stem}.{variant}.{extension}.index.json",
)
VARIANT_SHARD = r"{stem}\.{variant}-\d{{5}}-of-\d{{5}}\.{extension}|{stem}-\d{{5}}-of-\d{{5}}\.{variant}\.{extension}"
VARIANT = r"[A-Za-z0-9_-]+"
IGNORED_VARIANTS = {"non_ema"}
# Of the variants in a folder that has nothing else, the ones to take first.
PREFERRED_VARIANTS = ("fp16", "bf16", "fp32")


def choose_weight_files(names: Iterable[str], variant: str | None = None) -> tuple[str, ...]:
    """Chooses the weight files of one folder.

    Safetensors come before pickles and one file before shards. The asked-for variant comes first, then the plain
    files, then whatever variant there is.

    Args:
        names: plain names of the folder's files.
        variant: "fp16" and the like; None for the plain files.

    Returns:
        The file to open, which is the weight file or the index of a sharded one, followed by the shards; empty when
        there is none.
    """
    names = set(names)
    for chosen in (variant, None, *_variants(names)):
        for candidate, shards in _candidates(chosen):
            if candidate in names:
                return candidate, *sorted(name for name in names if shards and re.fullmatch(shards, name))
    return ()


def variant_of(name: str) -> str | None:
    """The variant that a weight file's or an index's name tells, None for a plain one."""
    for extension, stems in STEMS:
        for stem in stems:
            for spelling in (VARIANT_SINGLE, *VARIANT_INDICES):
                pattern = re.escape(spelling.format(stem=stem, variant="@", extension=extension))
                match = re.fullmatch(pattern.replace("@", f"({VARIANT})"), name)
                if match and match[1] not in {"index", *IGNORED_VARIANTS}:
                    return match[1]
    return None


def read_weight_index(path: Path) -> dict[str, list[str]]:
    """Reads the index of a sharded checkpoint.

    Returns:
        Shard file name => names of the tensors it holds; shards in order of their names.

    Raises:
        ModelError: missing, malformed, or naming anything but files beside it.
    """
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(str(path), "has no weight_map, so it is no index of a sharded checkpoint")
    shards: dict[str, list[str]] = {}
    for tensor, shard in weight_map.items():
        shards.setdefault(sibling_file(path.parent, shard).name, []).append(tensor)
    return dict(sorted(shards.items()))


def _candidates(variant: str | None) -> Iterator[tuple[str, str | None]]:
    """Names to look for, in order, each with the pattern of its shards if it is an index."""
    single, indices, shard = (
        (SINGLE, (INDEX,), SHARD) if variant is None else (VARIANT_SINGLE, VARIANT_INDICES, VARIANT_SHARD)
    )
    for extension, stems in STEMS:
        for stem in stems:
            yield single.format(stem=stem, variant=variant, extension=extension), None
        for stem in stems:
            shards = shard.format(stem=stem, variant=re.escape(variant or ""), extension=extension)
            for index in indices:
                yield index.format(stem=stem, variant=variant, extension=extension), shards


def _variants(names: Iterable[str]) -> list[str]:
    """The variants there are, the preferred ones first."""
    found = {variant for variant in map(variant_of, names) if variant}
    rank = {variant: position for position, variant in enumerate(PREFERRED_VARIANTS)}
    return sorted(found, key=lambda variant: (rank.get(variant, len(rank)), variant))
