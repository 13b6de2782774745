"""Reasons why a region keeps its coarse mask. Journal, tables and summaries all use these."""

from enum import StrEnum


class Reason(StrEnum):
    """Why a region keeps its coarse mask: the part after the colon in the status `kept:<reason>`."""

    CATEGORY = "category"
    CROWD = "crowd"
    CROWDED_OUT = "crowded-out"
    DRIFT = "drift"
    DRY_RUN = "dry-run"
    EMPTY = "empty"
    EMPTY_RESULT = "empty-result"
    IMAGE_MISSING = "image-missing"
    IMAGE_OUTSIDE = "image-outside"
    IMAGE_TOO_LARGE = "image-too-large"
    IMAGE_UNREADABLE = "image-unreadable"
    LOW_SCORE = "low-score"
    NO_GAIN = "no-gain"
    NO_TRUTH = "no-truth"
    OUT_OF_MEMORY = "out-of-memory"
    SIZE_MISMATCH = "size-mismatch"
    STUFF = "stuff"
    TOO_SMALL = "too-small"
    UNCHANGED = "unchanged"
    UNREADABLE = "unreadable"
    UNREADABLE_MASK = "unreadable-mask"
    WORKER_DIED = "worker-died"
