"""Safetensors whose metadata say, in one entry of JSON, what they hold: heads, adapters, encoders, trained weights."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from refinetool.errors import WeightsError


def read_description(path: Path, *, entry: str, what: str, writer: str) -> Any:
    """Read what a file says of itself.

    Args:
        entry: Name of the entry in the metadata.
        what: What the file should hold, for messages, such as "a head".
        writer: The command that writes such files.

    Returns:
        The content of the entry in JSON types; an empty dict if there is no such entry.

    Raises:
        WeightsError: The file can't be read, is no safetensors, or the entry is not JSON.
    """
    with _opened(path, what, writer) as file:
        return _description(file, entry)


def read_described(path: Path, *, entry: str, what: str, writer: str) -> tuple[Any, dict[str, Tensor]]:
    """Read what a file says of itself, and its tensors by name; see `read_description`."""
    with _opened(path, what, writer) as file:
        return _description(file, entry), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@contextmanager
def _opened(path: Path, what: str, writer: str) -> Iterator[Any]:
    """Open a file; what goes wrong while it is read is said in one sentence."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except OSError as error:
        raise WeightsError(f"{path}: {what} can't be read from this file: {error.strerror or error}") from error
    except (SafetensorError, ValueError, RecursionError) as error:
        raise WeightsError(f"{path}: this is not {what} ({error}); {writer} writes one") from error


def _description(file: Any, entry: str) -> Any:
    return json.loads((file.metadata() or {}).get(entry, "{}"))
