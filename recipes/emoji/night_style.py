"""Makes twenty pictures in a style of their own to fine-tune the bundled model on: emoji at night.

    python recipes/emoji/night_style.py night
    mlx-cm train lcm-lora --data night --model emoji --config style -o run
    mlx-cm generate "a rocket at night" --lora run/lora/pytorch_lora_weights.safetensors

The bundled model draws them, so nothing has to be installed; then white becomes a dark sky, and colours moonlight.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image

import mlx_cm
from mlx_cm.bundled import BUNDLED
from mlx_cm.errors import MlxCmError
from mlx_cm.storage import atomic_folder

SUBJECTS = (
    "red apple", "pizza", "cat face", "dog face", "sunflower", "red heart", "penguin", "snowman", "banana", "rainbow",
    "robot", "octopus", "crown", "hot beverage", "soccer ball", "guitar", "house", "tree", "fish", "bird",
)  # fmt: skip
SKY = np.array([18, 22, 60], dtype=np.float32)
MOONLIGHT = np.array([0.55, 0.65, 1.0], dtype=np.float32)
STAR = (255, 250, 200)
STARS = 5  # to a picture


def at_night(image: Image.Image, seed: int) -> Image.Image:
    """A picture on white as it looks at night: white is sky with some stars, and the rest bluish and darker."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    drawn = np.clip((255 - pixels.min(axis=2, keepdims=True)) / 64, 0, 1)  # how much of a pixel is not paper
    night = Image.fromarray((drawn * pixels * MOONLIGHT + (1 - drawn) * SKY).astype(np.uint8))
    generator = np.random.default_rng(seed)
    free = np.argwhere(drawn[..., 0] < 0.05)
    for y, x in free[generator.permutation(len(free))[:STARS]]:
        night.putpixel((int(x), int(y)), STAR)
    return night


def main() -> None:
    """Writes the pictures with their captions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("-m", "--model", default=BUNDLED)
    arguments = parser.parse_args()
    try:
        pipeline = mlx_cm.load(arguments.model)
        with atomic_folder(arguments.folder) as partial:
            lines = []
            for seed, subject in enumerate(SUBJECTS):
                (image,) = pipeline.generate(subject, seed=seed)
                at_night(image, seed).save(partial / f"{seed:02}.png")
                lines.append(json.dumps({"file_name": f"{seed:02}.png", "text": f"{subject} at night"}))
            (partial / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    except MlxCmError as error:
        raise SystemExit(f"error: {error}") from None
    print(arguments.folder)


if __name__ == "__main__":
    main()
