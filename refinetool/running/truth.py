"""Adds ground truth to coarse samples, for upper bounds and ablations."""

from collections.abc import Iterable, Iterator
from dataclasses import replace

from refinetool.errors import DataError, UsageError
from refinetool.formats.joining import joined
from refinetool.records import Region, Sample
from refinetool.statuses import Reason


def with_truth(samples: Iterable[Sample], truths: Iterable[Sample]) -> Iterator[Sample]:
    """Yield coarse samples with ground truth in their regions, matched by image and id; images without any come last.

    A region without ground truth is kept for `no-truth`.

    Raises:
        UsageError: The samples are class maps, whose parts have no ground truth of their own.
        DataError: An image occurs twice, or differs in size.
    """
    for key, found in joined(samples, truths):
        sample, truth = found.get(0), found.get(1)
        if sample is None:
            continue
        if sample.layout == "semantic":
            raise UsageError(
                f"Image {key} is a class map. Its parts have no ground truth of their own to choose by; the oracle "
                "needs objects."
            )
        if truth is not None and truth.size != sample.size:
            sizes = " and ".join(f"{width} x {height}" for height, width in (sample.size, truth.size))
            raise DataError(
                f"Image {key}: the coarse masks and their ground truth are {sizes}; they must have the same size."
            )
        known = {} if truth is None else {region.id: region.mask for region in truth.regions}
        regions = (_informed(region, replace(region, truth=known.get(region.id))) for region in sample.regions)
        yield replace(sample, regions=tuple(regions))


def _informed(region: Region, informed: Region) -> Region:
    if informed.truth is not None or region.keep is not None:
        return informed
    return replace(region, keep=Reason.NO_TRUTH)
