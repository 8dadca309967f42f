"""The model that comes with the program: small, and whole, so that the first picture needs no download."""

from pathlib import Path

BUNDLED = "emoji"  # the reference that stands for it; a file or folder of that name is ./emoji
FOLDER = Path(__file__).resolve().parent / "bundle" / BUNDLED


def local_path(ref: str | Path) -> Path:
    """The path that a reference means on this machine: as it is written, or that of the bundled model."""
    return FOLDER if ref == BUNDLED else Path(ref).expanduser()
