"""Makes twenty pictures in a style of their own to fine-tune the bundled model on: emoji in blue ink.

    python recipes/emoji/ink_style.py ink
    mlx-cm train lcm-lora --data ink --model emoji --config style -o run
    mlx-cm generate "rocket" --lora run/lora/pytorch_lora_weights.safetensors

The bundled model draws them, so nothing has to be installed; then their shades become shades of blue.
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
INK = np.array([20, 50, 150], dtype=np.float32)
PAPER = np.array([198, 224, 250], dtype=np.float32)


def in_ink(image: Image.Image) -> Image.Image:
    """A picture on white in one colour: black is ink, white is paper, what lies between a mixture."""
    shade = np.asarray(image.convert("L"), dtype=np.float32)[..., None] / 255
    return Image.fromarray(np.rint(INK + shade * (PAPER - INK)).astype(np.uint8))


def main() -> None:
    """Writes the pictures with their captions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("-m", "--model", default=BUNDLED)
    arguments = parser.parse_args()
    try:
        pipeline = mlx_cm.load(arguments.model)
        pictures = [pipeline.generate(subject, seed=seed)[0] for seed, subject in enumerate(SUBJECTS)]
        with atomic_folder(arguments.folder) as partial:
            names = [f"{number:02}.png" for number in range(len(SUBJECTS))]
            for name, picture in zip(names, pictures, strict=True):
                in_ink(picture).save(partial / name)
            lines = [json.dumps({"file_name": name, "text": text}) for name, text in zip(names, SUBJECTS, strict=True)]
            (partial / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    except MlxCmError as error:
        raise SystemExit(f"error: {error}") from None
    print(arguments.folder)


if __name__ == "__main__":
    main()
