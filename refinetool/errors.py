"""Exceptions for expected errors, and their exit codes.

    RefinetoolError
    ├── UsageError          2   the command can't be carried out as typed
    ├── DataError           1   a file or record is not valid
    │   ├── ImageError          an image is missing, broken or too large
    │   └── MaskError           a mask can't be decoded or has the wrong size
    ├── WeightsError        1   weights are missing, incomplete or not the published ones
    ├── StorageError        1   an output can't be written
    └── Interrupted       130   the user stopped the run; finished work is kept

A message is one or two sentences: where (file, record), what was found, what was expected, what to do.
Any other exception that reaches the user is a bug and keeps its traceback.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from refinetool.statuses import Reason


class RefinetoolError(Exception):
    """Any expected error; `str(error)` is the message to print."""

    exit_code = 1


class UsageError(RefinetoolError):
    """The command can't be carried out as typed."""

    exit_code = 2


class DataError(RefinetoolError):
    """A file or a record in it is not valid."""


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
    """An output can't be written: missing permissions, a full disk, an existing path."""


class Interrupted(RefinetoolError):  # noqa: N818 - not an error
    """The user stopped the run; finished work is in the journal."""

    exit_code = 130


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out: in Python, NumPy, a device, or torch on the CPU.

    Torch raises a plain RuntimeError on the CPU, so its message is searched.
    """
    return (
        isinstance(error, MemoryError)
        or any(base.__name__ == "OutOfMemoryError" for base in type(error).__mro__)
        or "DefaultCPUAllocator" in str(error)
    )
