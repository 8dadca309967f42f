"""Measures an emoji model: how often it draws what is asked for, and how near its pictures are to the real ones.

    python recipes/emoji/evaluate.py emoji                               # the bundled model
    python recipes/emoji/evaluate.py emoji -m runs/lcm/model --teacher runs/teacher/model --sheet held_out.png

Both measures live in one space: the means of the latents that the model's own autoencoder finds for a picture, 8x8x8
numbers. **Retrieval**: for captions of the data, the picture nearest to what was generated is one of the captioned
emoji, or of one with the same head noun. **Fréchet distance** between Gaussian fits of the pictures generated for the
first name of each emoji, and of the emoji themselves. Seeds are fixed: picture k of a list has seed k, or k more than
`--seed`.
"""

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx_cm  # isort: skip (before MLX, for which it prepares)
import mlx.core as mx
import numpy as np
from PIL import Image

from mlx_cm.bundled import BUNDLED
from mlx_cm.errors import MlxCmError
from mlx_cm.frechet import frechet_distance, gaussian_fit
from mlx_cm.images import contact_sheet, save_image, to_pil
from mlx_cm.pipelines.latent import PER_IMAGE, LatentConsistencyPipeline
from mlx_cm.pipelines.request import split_request
from mlx_cm.training.data import PictureData, open_data
from recipes.emoji.captions import held_out_captions

BATCH = 64
TEACHER_STEPS = 50
DRAWN_FROM = 0  # seed of the choice of captions


@dataclass(frozen=True)
class Emoji:
    """The pictures of one emoji among those of the data."""

    code: str  # of the file names
    name: str  # the caption of its first picture, which shows it plain
    pictures: tuple[int, ...]  # indices in the data; the plain one first


def emoji_of(data: PictureData) -> list[Emoji]:
    """The emoji of rendered data, in its order; files are called by code and number."""
    groups: dict[str, list[int]] = {}
    for index, entry in enumerate(data.entries):
        groups.setdefault(Path(entry.name).stem.rpartition("_")[0], []).append(index)
    return [Emoji(code, data.captions[members[0]], tuple(members)) for code, members in groups.items()]


def head_noun(name: str) -> str:
    """The last word of a name, before any "with" or "of": what the picture is of."""
    words = name.split()
    for stop in ("with", "of", "on", "without"):
        if stop in words[1:]:
            words = words[: words.index(stop, 1)]
    return words[-1]


def generated(
    pipeline: LatentConsistencyPipeline, prompts: Sequence[str], *, seed: int = 0, **settings: Any
) -> Iterator[mx.array]:
    """Pictures of prompts, the k-th with seed `seed` + k, in batches (B, H, W, 3) in [-1, 1]."""
    request = pipeline.resolve(list(prompts), seed=seed, **settings)
    request = replace(request, seeds=tuple(range(seed, seed + len(prompts))))
    for batch in split_request(request, PER_IMAGE, BATCH):
        yield mx.clip(pipeline.decode(pipeline.sample(batch)), -1, 1)


def features(pipeline: LatentConsistencyPipeline, pictures: Iterator[mx.array]) -> np.ndarray:
    """Means of the latents of pictures, float64, (N, h w c)."""
    rows = []
    for x in pictures:
        # With 8 bits, as pictures are looked at.
        x = mx.round((x + 1) * 127.5) / 127.5 - 1
        mean = pipeline.autoencoder.to_scaled(pipeline.autoencoder.encode(x)[0])
        rows.append(np.array(mean.reshape(len(x), -1), dtype=np.float64))
    return np.concatenate(rows)


def real_pictures(data: PictureData, indices: Sequence[int]) -> Iterator[mx.array]:
    """Pictures of the data in batches."""
    for start in range(0, len(indices), BATCH):
        rows = [np.asarray(data.read(index), dtype=np.float32) for index in indices[start : start + BATCH]]
        yield mx.array(np.stack(rows)) / 127.5 - 1


def retrieval(found: np.ndarray, wanted: Sequence[Emoji], all_features: np.ndarray, owners: Sequence[Emoji]) -> dict:
    """Shares of generated pictures whose nearest picture is of the wanted emoji, and of one with its head noun."""
    squares = (all_features**2).sum(axis=1)
    nearest = [owners[int(np.argmin(squares - 2 * all_features @ row))] for row in found]
    same = [one.code == other.code for one, other in zip(nearest, wanted, strict=True)]
    noun = [head_noun(one.name) == head_noun(other.name) for one, other in zip(nearest, wanted, strict=True)]
    return {
        "emoji": float(np.mean(same)),
        "head_noun": float(np.mean([a or b for a, b in zip(same, noun, strict=True)])),
    }


def chance(wanted: Sequence[Emoji], owners: Sequence[Emoji]) -> float:
    """How often a picture drawn at random from the data is of the wanted emoji or of one with its head noun."""
    nouns = [head_noun(owner.name) for owner in owners]
    return float(np.mean([nouns.count(head_noun(one.name)) / len(nouns) for one in wanted]))


def evaluate(
    model: str, data: PictureData, *, steps: Sequence[int], captions: int, seed: int, teacher: str | None
) -> dict:
    """All figures of a model, JSON's types."""
    pipeline = mlx_cm.load(model, dtype="float32")
    emoji = emoji_of(data)
    owners = [one for one in emoji for _ in one.pictures]
    real = features(pipeline, real_pictures(data, [index for one in emoji for index in one.pictures]))
    starts = np.cumsum([0, *(len(one.pictures) for one in emoji)])[:-1]
    fit = gaussian_fit(real[starts])
    chosen = np.sort(np.random.default_rng(DRAWN_FROM).permutation(len(emoji))[:captions])
    wanted = [emoji[index] for index in chosen]
    names = [one.name for one in emoji]

    rows = []
    for count in steps:
        found = features(pipeline, generated(pipeline, names, seed=seed, steps=count))
        row = retrieval(found[chosen], wanted, real, owners)
        rows.append({"steps": count, **row, "frechet": frechet_distance(gaussian_fit(found), fit)})
    result = {
        "model": model, "guidance_scale": pipeline.settings.guidance_scale, "emoji": len(emoji),
        "captions": len(wanted), "chance": chance(wanted, owners), "rows": rows,
        "autoencoder": {"frechet": frechet_distance(gaussian_fit(_decoded(pipeline, data, emoji)), fit)},
    }  # fmt: skip
    if teacher is not None:
        taught = mlx_cm.load(teacher, dtype="float32")
        scale = pipeline.settings.guidance_scale  # what the model was distilled from
        sampled = {"steps": TEACHER_STEPS, "sampler": "ddim", "guidance_scale": scale}
        found = features(pipeline, generated(taught, names, seed=seed, **sampled))
        row = retrieval(found[chosen], wanted, real, owners)
        result["teacher"] = {"steps": TEACHER_STEPS, **row, "frechet": frechet_distance(gaussian_fit(found), fit)}
    return result


def _decoded(pipeline: LatentConsistencyPipeline, data: PictureData, emoji: Sequence[Emoji]) -> np.ndarray:
    """Features of the real emoji after a way through the autoencoder: what no model of its latents can pass."""
    pictures = real_pictures(data, [one.pictures[0] for one in emoji])
    autoencoder = pipeline.autoencoder
    return features(pipeline, (mx.clip(autoencoder.decode(autoencoder.encode(x)[0]), -1, 1) for x in pictures))


def held_out_sheet(pipeline: LatentConsistencyPipeline) -> Image.Image:
    """Pictures of the held-out captions in their order, row by row, none left out."""
    pictures = [picture for x in generated(pipeline, held_out_captions()) for picture in to_pil(x)]
    return contact_sheet(pictures, columns=math.ceil(math.sqrt(len(pictures))))


def report(result: dict[str, Any]) -> str:
    """The figures as a Markdown table."""
    lines = ["| sampler | same emoji | same head noun | Fréchet distance |", "| --- | --- | --- | --- |"]

    def line(name: str, row: dict[str, float]) -> str:
        return f"| {name} | {row['emoji']:.1%} | {row['head_noun']:.1%} | {row['frechet']:.2f} |"

    lines += [line(f"{row['steps']} step{'s' * (row['steps'] > 1)}", row) for row in result["rows"]]
    if "teacher" in result:
        lines.append(line(f"teacher, {TEACHER_STEPS} DDIM steps", result["teacher"]))
    lines.append(f"| real, through the autoencoder | | | {result['autoencoder']['frechet']:.2f} |")
    lines.append(f"| a picture drawn at random | | {result['chance']:.1%} | |")
    return "\n".join(lines)


def main() -> None:
    """Prints the figures; writes the contact sheet of the held-out captions where asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="what render.py wrote")
    parser.add_argument("-m", "--model", default=BUNDLED)
    parser.add_argument("--teacher", help="compare with this teacher")
    parser.add_argument("--steps", default="1,2,4,8")
    parser.add_argument("--seed", type=int, default=0, help="of the first picture")
    parser.add_argument("--captions", type=int, default=300, help="of the retrieval")
    parser.add_argument("--sheet", type=Path, help="write pictures of the held-out captions")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    try:
        if arguments.sheet:
            print(save_image(held_out_sheet(mlx_cm.load(arguments.model)), arguments.sheet))
        data = open_data(arguments.data)
        steps = [int(part) for part in arguments.steps.split(",")]
        asked = {"captions": arguments.captions, "seed": arguments.seed, "teacher": arguments.teacher}
        result = evaluate(arguments.model, data, steps=steps, **asked)
    except MlxCmError as error:
        raise SystemExit(f"error: {error}") from None
    print(json.dumps(result) if arguments.json else report(result))


if __name__ == "__main__":
    main()
