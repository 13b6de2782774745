"""Keeps the embeddings of views in a folder, so that another run on the same images need not encode them again.

One file per view, named by a hash of its pixels and of everything else that its embedding depends on. The folder is
bounded: the files that were not used for longest are deleted. Several processes may share it.
"""

import hashlib
import logging
import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import safetensors.torch
from torch import Tensor

from refinetool.errors import StorageError
from refinetool.records import ImageArray

_LOG = logging.getLogger(__name__)
SUFFIX = ".embedding"
KEPT_AFTER_CLEANING = 0.9
"""Fraction of the limit that is left after old files were deleted."""


class EmbeddingCache:
    """A folder of embeddings. May be used from several threads and processes."""

    def __init__(self, folder: Path, *, limit: int, about: Sequence[str]) -> None:
        """Open the folder, or make it.

        Args:
            limit: Bytes that it may take.
            about: Everything that an embedding depends on, apart from pixels: weights, precision, device, versions.

        Raises:
            StorageError: The folder can't be made.
        """
        self.folder, self.limit = folder, limit
        self._about = "\n".join(about).encode()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"{folder}: the folder for embeddings can't be made: {error.strerror}") from error
        self._size = sum(size for _, size, _ in self._files())
        self._works = True

    def find(self, image: ImageArray) -> tuple[Tensor, ...] | None:
        """Return the tensors kept for a view, on the CPU; None if there are none, or they can't be read."""
        path = self._path(image)
        try:
            held = safetensors.torch.load(path.read_bytes())
            tensors = tuple(held[str(n)] for n in range(len(held)))
            os.utime(path)  # used last
        except Exception:  # no such file, or a damaged one, which is written again
            return None
        return tensors

    def keep(self, image: ImageArray, tensors: Sequence[Tensor]) -> None:
        """Keep the tensors of a view. If the folder can't be written, a warning is logged once, and nothing is kept."""
        if not self._works:
            return
        content = safetensors.torch.save({str(n): tensor.cpu().contiguous() for n, tensor in enumerate(tensors)})
        path = self._path(image)
        try:
            path.parent.mkdir(exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
                draft = Path(file.name)
                try:
                    file.write(content)
                    file.close()
                    draft.replace(path)  # another process sees the whole file or none
                except BaseException:
                    draft.unlink(missing_ok=True)
                    raise
        except OSError as error:
            self._works = False
            _LOG.warning("%s: embeddings are no longer kept: %s", self.folder, error.strerror)
            return
        self._size += len(content)
        if self._size > self.limit:
            self._clean()

    def _path(self, image: ImageArray) -> Path:
        digest = hashlib.blake2b(self._about, digest_size=20)
        digest.update(repr(image.shape).encode())
        digest.update(np.ascontiguousarray(image).data)
        name = digest.hexdigest()
        return self.folder / name[:2] / (name[2:] + SUFFIX)

    def _files(self) -> list[tuple[int, int, Path]]:
        """Return (time of last use, bytes, path) of all files, the oldest first."""
        found = []
        for path in self.folder.glob(f"??/*{SUFFIX}"):
            with suppress(FileNotFoundError):  # another process cleans, too
                status = path.stat()
                found.append((status.st_mtime_ns, status.st_size, path))
        return sorted(found)

    def _clean(self) -> None:
        files = self._files()
        self._size = sum(size for _, size, _ in files)
        for _, size, path in files:
            if self._size <= KEPT_AFTER_CLEANING * self.limit:
                return
            with suppress(OSError):
                path.unlink()
            self._size -= size
