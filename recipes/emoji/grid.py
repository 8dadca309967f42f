"""Draws the picture at the top of the README: a row per word, a column per seed, 0, 1, ... in order, none left out.

python recipes/emoji/grid.py docs/images/emoji.png
"""

import argparse
from pathlib import Path

from PIL import Image

import mlx_cm
from mlx_cm.bundled import BUNDLED
from mlx_cm.errors import MlxCmError
from mlx_cm.images import contact_sheet, save_image
from mlx_cm.pipelines.latent import LatentConsistencyPipeline

WORDS = ("red apple", "grinning face", "cat face", "penguin", "sunflower", "pizza", "rocket", "blue heart")
SEEDS = range(8)


def grid(pipeline: LatentConsistencyPipeline) -> Image.Image:
    """A row per word, a column per seed."""
    pictures = pipeline.generate(WORDS, seed=list(SEEDS), batch_size=len(SEEDS))
    return contact_sheet(pictures, columns=len(SEEDS))


def main() -> None:
    """Writes the grid."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path)
    parser.add_argument("-m", "--model", default=BUNDLED)
    arguments = parser.parse_args()
    try:
        print(save_image(grid(mlx_cm.load(arguments.model)), arguments.picture))
    except MlxCmError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
