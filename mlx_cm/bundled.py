"""The model that comes with the program: small, and whole, so that the first picture needs no download."""

from pathlib import Path

BUNDLED = "emoji"  # the reference that stands for it, where no file or folder is called so
FOLDER = Path(__file__).resolve().parent / "bundle" / BUNDLED


def local_path(ref: str | Path) -> Path:
    """The path that a reference means on this machine: as it is written, or that of the bundled model."""
    path = Path(ref).expanduser()
    return FOLDER if str(ref) == BUNDLED and not path.exists() else path
