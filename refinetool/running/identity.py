"""Identifies a job, so that a later run knows whether it can continue an earlier one."""

from dataclasses import asdict
from importlib.metadata import version

from refinetool.backends import Backend
from refinetool.backends.models import pick_device, pick_precision
from refinetool.settings import RefineSettings

PACKAGES = ("refinetool", "torch", "numpy", "scipy", "opencv-python-headless", "pillow")
"""Packages whose version may affect pixels."""
MEMORY_BOUNDS = ("image_batch", "prompt_batch", "max_pixels")
"""Settings that change masks by rounding at most. A run that hit these limits may be resumed with other values."""
WRITING = ("polygons",)
"""Settings that change only how masks are written."""


def job_identity(
    backend: Backend, settings: RefineSettings, *, model: str, device: str, precision: str, format: str
) -> dict[str, object]:
    """Return everything that affects refined masks, apart from masks and images, in JSON types.

    Args:
        settings: Resolved.
        model, device, precision: As given by the user.
        format: Format of the coarse masks.
    """
    place = pick_device(device)
    return {
        "versions": {package: version(package) for package in PACKAGES},
        "model": model,
        "fingerprint": backend.fingerprint,
        "device": place.partition(":")[0],
        "precision": pick_precision(precision, place),
        "format": format,
        "settings": {name: value for name, value in asdict(settings).items() if name not in (*MEMORY_BOUNDS, *WRITING)},
    }
