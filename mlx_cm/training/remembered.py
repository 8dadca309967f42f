"""What was found out about files, kept for as long as they do not change."""

import contextlib
import json
from pathlib import Path
from typing import Any

from mlx_cm.errors import DiskError
from mlx_cm.storage import atomic_file

Stamp = tuple[int, int]  # size and time of change of a file, nanoseconds


class Remembered:
    """Values by name, each valid for one stamp, in a JSON file.

    The file only saves time: one that cannot be read is as good as empty, and one that cannot be written is left out.

    Args:
        path: the file; it need not exist.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        self._values: dict[str, Any] = {}
        self._changed = False
        with contextlib.suppress(OSError, ValueError, RecursionError):
            values = json.loads(self.path.read_bytes())
            self._values = values if isinstance(values, dict) else {}

    def get(self, name: str, stamp: Stamp) -> list[Any] | None:
        """What is known of `name` as it is now."""
        match self._values.get(name):
            case [size, time, list(value)] if (size, time) == tuple(stamp):
                return value
        return None

    def put(self, name: str, stamp: Stamp, value: list[Any]) -> None:
        """Remembers a value that JSON can hold; `save` writes it."""
        if self.get(name, stamp) != value:
            self._values[name] = [*stamp, value]
            self._changed = True

    def save(self) -> None:
        """Writes the file if something is new."""
        if self._changed:
            text = json.dumps(self._values, separators=(",", ":"))  # ASCII: a file's name need not be valid Unicode
            with contextlib.suppress(DiskError), atomic_file(self.path) as partial:
                partial.write_text(text, encoding="ascii")
            self._changed = False
