"""A disk that fails, or a person who interrupts, at a chosen moment."""

import errno
import io
import os
from collections.abc import Callable

# (what is raised, whether after the operation)
FAILURES = {
    "disk full": (OSError(errno.ENOSPC, "No space left on device"), False),
    "interrupted before": (KeyboardInterrupt(), False),
    "interrupted after": (KeyboardInterrupt(), True),
}


class Failing:
    """Lets the n-th operation on the disk fail, or what follows it, if `late`.

    Operations are making a folder, opening for writing, writing, flushing, renaming, linking.
    """

    def __init__(self, monkeypatch, at: int, error: BaseException, late: bool):
        self.at, self.error, self.late, self.done = at, error, late, []
        real_open = io.open
        outer = self

        class Writing:
            def __init__(self, file):
                self.file = file

            def __enter__(self):
                return self

            def __exit__(self, *reason):
                self.file.close()

            def __getattr__(self, name):
                return getattr(self.file, name)

            def write(self, data):
                return outer.step("write", self.file.write, data)

        def opening(file, mode="r", *args, **kwargs):
            if not set(mode) & set("wax+"):
                return real_open(file, mode, *args, **kwargs)
            return Writing(outer.step("open", real_open, file, mode, *args, **kwargs))

        def stepping(name, function):
            def call(*args, **kwargs):
                return outer.step(name, function, *args, **kwargs)

            return call

        monkeypatch.setattr(io, "open", opening)
        for name in ("mkdir", "replace", "fsync", "link"):
            monkeypatch.setattr(os, name, stepping(name, getattr(os, name)))

    def step(self, name: str, function: Callable, *args, **kwargs):
        self.done.append(name)
        fails = len(self.done) - 1 == self.at
        if fails and not self.late:
            raise self.error
        result = function(*args, **kwargs)
        if fails:
            raise self.error
        return result
