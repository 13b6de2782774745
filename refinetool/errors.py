"""What can go wrong, and the exit code it ends in.

    RefinetoolError
    ├── UsageError          2   the command can't be carried out as typed
    ├── DataError           1   a file or record is not what it should be
    │   ├── ImageError          an image is missing, broken or too large
    │   └── MaskError           a mask can't be decoded or has the wrong size
    ├── WeightsError        1   weights are missing, incomplete or not the published ones
    ├── StorageError        1   an output can't be written
    └── Interrupted       130   the user stopped the run; what is finished is kept

A message is one sentence or two: where (file, record), what was found, what was expected, what to do.
Anything else that reaches the user is a bug and keeps its traceback.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from refinetool.statuses import Reason


class RefinetoolError(Exception):
    """Any expected problem; `str(error)` is the sentence to print."""

    exit_code = 1


class UsageError(RefinetoolError):
    """The command can't be carried out as typed."""

    exit_code = 2


class DataError(RefinetoolError):
    """A file or a record in it is not what it should be."""


class ImageError(DataError):
    """An image is missing, broken, too large, or its size contradicts the annotations."""

    def __init__(self, message: str, reason: "Reason") -> None:
        super().__init__(message)
        self.reason = reason
        """Why the masks of this image are kept."""


class MaskError(DataError):
    """A mask can't be decoded, or has the wrong size."""


class WeightsError(RefinetoolError):
    """Model weights are missing, incomplete, or not the published ones."""


class StorageError(RefinetoolError):
    """An output can't be written: permissions, a full disk, a path in the way."""


class Interrupted(RefinetoolError):  # noqa: N818 - a state, not a fault
    """The user stopped the run; finished work is in the journal."""

    exit_code = 130


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: Python's, NumPy's, a device's, or torch's on the CPU, which has no class of its own."""
    return (
        isinstance(error, MemoryError)
        or any(base.__name__ == "OutOfMemoryError" for base in type(error).__mro__)
        or "DefaultCPUAllocator" in str(error)
    )
