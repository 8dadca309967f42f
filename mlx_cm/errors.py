"""The errors a user can meet, each with the exit code the command line ends with."""


class MlxCmError(Exception):
    """One clear error: what failed, why, and what to try.

    Args:
        what: the thing that failed ("unet/model.safetensors", "--steps 0").
        why: the reason, with actual and expected values.
        hint: a command or an action that helps, where one exists.
    """

    exit_code = 1

    def __init__(self, what: str, why: str, hint: str | None = None):
        super().__init__(what, why, hint)
        self.what, self.why, self.hint = what, why, hint

    def __str__(self) -> str:
        return f"{self.what}: {self.why}"


class UsageError(MlxCmError):
    """A setting is wrong, or the loaded model has no use for it."""

    exit_code = 2


class ModelError(MlxCmError):
    """A model, file or folder is missing, broken, or not what it is taken for."""

    exit_code = 3


class NetworkError(MlxCmError):
    """The Hub cannot be reached, or refuses."""

    exit_code = 4


class MemoryBudgetError(MlxCmError):
    """The work does not fit into the memory allowed."""

    exit_code = 5


class DiskError(MlxCmError):
    """Writing failed: no space, no permission, a target that exists."""

    exit_code = 6


class OutputError(MlxCmError):
    """The model produced non-finite or blank output."""

    exit_code = 7
