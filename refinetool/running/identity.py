"""What a job is made of, so that a later run knows whether it may go on from what an earlier one left."""

from dataclasses import asdict
from importlib.metadata import version

from refinetool.backends import Backend
from refinetool.backends.models import pick_device, pick_precision
from refinetool.settings import RefineSettings

PACKAGES = ("refinetool", "torch", "numpy", "scipy", "opencv-python-headless", "pillow")
"""Packages whose version may decide a pixel."""
MEMORY_BOUNDS = ("image_batch", "prompt_batch", "max_pixels")
"""Settings that change a mask by rounding at most: a run that met their limits may be resumed with others."""


def job_identity(
    backend: Backend, settings: RefineSettings, *, model: str, device: str, precision: str, format: str
) -> dict[str, object]:
    """All that decides a refined mask apart from masks and images, as JSON can hold it.

    Args:
        settings: Resolved.
        model, device, precision: As the user named them.
        format: Of the coarse masks.
    """
    place = pick_device(device)
    return {
        "versions": {package: version(package) for package in PACKAGES},
        "model": model,
        "fingerprint": backend.fingerprint,
        "device": place.partition(":")[0],
        "precision": pick_precision(precision, place),
        "format": format,
        "settings": {name: value for name, value in asdict(settings).items() if name not in MEMORY_BOUNDS},
    }
