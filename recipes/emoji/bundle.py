"""Puts a trained emoji model into the package: float16, under the name that it is loaded by, beside its card.

python recipes/emoji/bundle.py runs/lcm/model
"""

import argparse
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

from mlx_cm.bundled import BUNDLED, FOLDER
from mlx_cm.errors import MlxCmError
from mlx_cm.model_folder import read_model_index, write_model_index
from mlx_cm.rewriting import cast_folder
from mlx_cm.storage import atomic_folder

CARD = ("README.md", "*.png")  # written by hand, and kept
STEPS = 1  # by default: what more of them improve is measured, and hardly seen
LARGEST = 12_000_000  # bytes, all files together


def bundle(source: Path, destination: Path) -> int:
    """Writes the bundled model.

    Returns:
        Its size in bytes.

    Raises:
        SystemExit: it is larger than what a wheel is to carry.
        As `cast_folder`.
    """
    with tempfile.TemporaryDirectory() as scratch, atomic_folder(destination, overwrite=True) as partial:
        half = cast_folder(source, Path(scratch) / "half", "float16")
        shutil.copytree(half, partial, dirs_exist_ok=True)
        index = read_model_index(partial)
        provenance = index.provenance | {"source": BUNDLED, "revision": None}
        write_model_index(partial, replace(index, provenance=provenance, sampler=index.sampler | {"steps": STEPS}))
        for path in (path for pattern in CARD for path in destination.glob(pattern)):
            shutil.copyfile(path, partial / path.name)
        size = sum(path.stat().st_size for path in partial.rglob("*") if path.is_file())
        if size > LARGEST:
            raise SystemExit(f"error: {size:,} bytes, expected at most {LARGEST:,}")
    return size


def main() -> None:
    """Writes it and says how large it is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="the model folder that training wrote")
    parser.add_argument("--destination", type=Path, default=FOLDER)
    arguments = parser.parse_args()
    try:
        size = bundle(arguments.source, arguments.destination)
    except MlxCmError as error:
        raise SystemExit(f"error: {error}") from None
    print(f"{arguments.destination}: {size:,} bytes")


if __name__ == "__main__":
    main()
