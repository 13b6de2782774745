"""Maps rows in batches of a fixed size, so that the rounding of a row does not depend on the rest of its batch."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from refinetool.errors import is_out_of_memory

T = TypeVar("T")
U = TypeVar("U")


def power_of_two(count: int) -> int:
    """Round down to a power of two.

    Vectorised kernels treat the elements left over from their last full step in another way, which can change the last
    bit of a row by its place in the batch. Powers of two leave nothing over.
    """
    return 1 << (count.bit_length() - 1)


def in_batches(rows: Sequence[T], *, size: int, call: Callable[[Sequence[T]], Sequence[U]]) -> list[U]:
    """Map rows in batches of a fixed size; the last batch is padded with copies of its first row.

    All calls then have the same shapes, and the result of a row does not depend on how many other rows there are. A
    batch that does not fit into memory is mapped in halves, whose results may differ in the last bits.

    Raises:
        Exception: Any exception of a call; out of memory only if a single row does not fit.
    """
    found: list[U] = []
    for start in range(0, len(rows), size):
        batch = rows[start : start + size]
        filler = [batch[0]] * (size - len(batch))
        found += _halved_until_it_fits([*batch, *filler], call)[: len(batch)]
    return found


def _halved_until_it_fits(batch: Sequence[T], call: Callable[[Sequence[T]], Sequence[U]]) -> list[U]:
    try:
        return list(call(batch))
    except Exception as error:
        if len(batch) == 1 or not is_out_of_memory(error):
            raise
    half = len(batch) // 2  # outside the except block, so that the failed call's tensors are freed
    return [row for part in (batch[:half], batch[half:]) for row in _halved_until_it_fits(part, call)]
