"""The one model that is not fetched, and what to tell someone who mistyped a name."""

import difflib
from collections.abc import Iterable

EMBEDDED = "embedded"
"""The model whose weights come with the package."""


def suggest(name: str, known: Iterable[str]) -> str:
    """The nearest of the known names, if one is near, and all of them."""
    names = list(known)
    close = difflib.get_close_matches(name.lower(), names, n=1)
    return (f"did you mean {close[0]}? The names are " if close else "the names are ") + ", ".join(names)
