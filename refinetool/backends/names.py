"""The name of the embedded model, and suggestions for mistyped names."""

import difflib
from collections.abc import Iterable

EMBEDDED = "embedded"
"""The model whose weights come with the package."""


def suggest(name: str, known: Iterable[str]) -> str:
    """Suggest the closest known name, if there is a similar one, and list all known names."""
    names = list(known)
    close = difflib.get_close_matches(name.lower(), names, n=1)
    return (f"did you mean {close[0]}? The names are " if close else "the names are ") + ", ".join(names)
