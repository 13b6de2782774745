"""Exceptions for expected errors, and their exit codes.

    RefinetoolError
    ├── UsageError          2   the command can't be carried out as typed
    ├── DataError           1   a file or record is not valid
    │   ├── ImageError          an image is missing, broken or too large
    │   └── MaskError           a mask can't be decoded or has the wrong size
    ├── WeightsError        1   weights are missing, incomplete or not the published ones
    ├── StorageError        1   an output can't be written
    └── Interrupted       130   the user stopped the run; finished work is kept

A message is one or two sentences: where (file, record), what was found, what was expected, what to do. It may quote
what files contain, so control characters are escaped and very long quotations are shortened.
Any other exception that reaches the user is a bug and keeps its traceback.
"""

import pickle
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from refinetool.statuses import Reason


LONGEST_MESSAGE = 1000
"""Characters; of a longer message the middle is left out, so that both the place and the advice are kept."""


def printable(text: str) -> str:
    """Escape what could change a terminal, forge a line of a log or fail to be encoded: `\\x1b`, `\\n`, `\\udcff`."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def shortened(text: str) -> str:
    """Leave out the middle of a text of more than LONGEST_MESSAGE characters."""
    if len(text) <= LONGEST_MESSAGE:
        return text
    return f"{text[: LONGEST_MESSAGE - 405]} ... {text[-400:]}"


class RefinetoolError(Exception):
    """Any expected error; `str(error)` is the message to print."""

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(shortened(printable(message)))


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

    def __init__(self, message: str) -> None:
        Exception.__init__(self, message)  # it may be of two lines, and quotes the command line in full


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out: in Python, NumPy, OpenCV, a device, or torch on the CPU.

    OpenCV and, on the CPU, torch have no class of error for it, so the message is searched.
    """
    return (
        isinstance(error, MemoryError)
        or any(base.__name__ == "OutOfMemoryError" for base in type(error).__mro__)
        or any(sign in str(error) for sign in ("DefaultCPUAllocator", "Insufficient memory"))
    )


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, or its class.

    Where torch refuses to unpickle a file, it tells how to do it all the same: no advice for a file from elsewhere.
    """
    if isinstance(error, pickle.UnpicklingError):
        return "it is not a file of tensors and plain values only"
    return str(error).strip().partition("\n")[0] or type(error).__name__
