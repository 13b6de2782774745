"""Downloads official weights into the cache and verifies them: URLs, sizes and SHA-256 of all files.

Files are fetched with the standard library and not with pooch, which restarts interrupted downloads from the beginning;
these files have up to 2.6 GB. Nothing is downloaded unless the user asks for it, and nothing here imports torch.

About the checksums: no publisher gives a SHA-256 beside the download; the six digits in the names of SAM's files are
the beginning of their MD5. `origin="publisher"` marks checksums that the publisher's own repository on the model hub
records for the file. The others, `origin="agreed"`, are pinned by several independent public projects and recorded for
copies on the hub, always with the same value. None has been checked here against a download.
"""

import hashlib
import http
import http.client
import os
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import platformdirs

from refinetool.backends.names import EMBEDDED, suggest
from refinetool.errors import RefinetoolError, StorageError, UsageError, WeightsError

OnProgress: TypeAlias = Callable[[int, int], None]
"""Called with (bytes downloaded, bytes in total); bytes of an earlier, interrupted download are included."""

State: TypeAlias = Literal["missing", "partial", "present", "verified", "damaged"]
"""`present` files have the right size but were not read; `verified` and `damaged` follow from the checksum."""

META = "https://dl.fbaipublicfiles.com"
HQ_SAM = "https://huggingface.co/lkeab/hq-sam/resolve/main"
CACHE_VARIABLE = "REFINETOOL_CACHE"
TIMEOUT_S = 30.0
CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Weights:
    """One published file. `size` is in bytes; `origin` is the source of the checksum, see the top of the module."""

    model: str
    url: str
    size: int
    sha256: str
    origin: Literal["publisher", "agreed"]

    @property
    def filename(self) -> str:
        return self.url.rpartition("/")[2]


@dataclass(frozen=True, slots=True)
class Status:
    """The state of one file in the cache; `detail` is the message for the user."""

    weights: Weights
    path: Path
    state: State
    detail: str


PUBLISHED: dict[str, Weights] = {
    weights.model: weights
    for weights in (
        Weights(
            "sam-vit-b",
            f"{META}/segment_anything/sam_vit_b_01ec64.pth",
            375_042_383,
            "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912",
            "agreed",
        ),
        Weights(
            "sam-vit-l",
            f"{META}/segment_anything/sam_vit_l_0b3195.pth",
            1_249_524_607,
            "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622",
            "agreed",
        ),
        Weights(
            "sam-vit-h",
            f"{META}/segment_anything/sam_vit_h_4b8939.pth",
            2_564_550_879,
            "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e",
            "agreed",
        ),
        Weights(
            "sam-hq-vit-b",
            f"{HQ_SAM}/sam_hq_vit_b.pth",
            379_335_069,
            "14a9d662cd6f5a9c2dba6d40ab0058d88d287e4a18fd6fdc6ad5fb1a3fdeaa57",
            "publisher",
        ),
        Weights(
            "sam-hq-vit-l",
            f"{HQ_SAM}/sam_hq_vit_l.pth",
            1_254_865_805,
            "e1a6c385d62bf005ded91a54d5ec55c985cfc4103ef89c08d90f39f04934c343",
            "publisher",
        ),
        Weights(
            "sam-hq-vit-h",
            f"{HQ_SAM}/sam_hq_vit_h.pth",
            2_570_940_653,
            "a7ac14a085326d9fa6199c8c698c4f0e7280afdbb974d2c4660ec60877b45e35",
            "publisher",
        ),
        Weights(
            "sam-hq-vit-tiny",
            f"{HQ_SAM}/sam_hq_vit_tiny.pth",
            42_526_881,
            "0f32c075ccdd870ae54db2f7630e7a0878ede5a2b06d05d6fe02c65a82fb7196",
            "publisher",
        ),
        Weights(
            "sam2.1-hiera-t",
            f"{META}/segment_anything_2/092824/sam2.1_hiera_tiny.pt",
            156_008_466,
            "7402e0d864fa82708a20fbd15bc84245c2f26dff0eb43a4b5b93452deb34be69",
            "publisher",
        ),
        Weights(
            "sam2.1-hiera-s",
            f"{META}/segment_anything_2/092824/sam2.1_hiera_small.pt",
            184_416_285,
            "6d1aa6f30de5c92224f8172114de081d104bbd23dd9dc5c58996f0cad5dc4d38",
            "publisher",
        ),
        Weights(
            "sam2.1-hiera-b+",
            f"{META}/segment_anything_2/092824/sam2.1_hiera_base_plus.pt",
            323_606_802,
            "a2345aede8715ab1d5d31b4a509fb160c5a4af1970f199d9054ccfb746c004c5",
            "agreed",
        ),
        Weights(
            "sam2.1-hiera-l",
            f"{META}/segment_anything_2/092824/sam2.1_hiera_large.pt",
            898_083_611,
            "2647878d5dfa5098f2f8649825738a9345572bae2d4350a2468587ece47dd318",
            "agreed",
        ),
        Weights(
            "sam2-hiera-t",
            f"{META}/segment_anything_2/072824/sam2_hiera_tiny.pt",
            155_906_050,
            "65b50056e05bcb13694174f51bb6da89c894b57b75ccdf0ba6352c597c5d1125",
            "publisher",
        ),
        Weights(
            "sam2-hiera-s",
            f"{META}/segment_anything_2/072824/sam2_hiera_small.pt",
            184_309_650,
            "95949964d4e548409021d47b22712d5f1abf2564cc0c3c765ba599a24ac7dce3",
            "publisher",
        ),
        Weights(
            "sam2-hiera-b+",
            f"{META}/segment_anything_2/072824/sam2_hiera_base_plus.pt",
            323_493_298,
            "d0bb7f236400a49669ffdd1be617959a8b1d1065081789d7bbff88eded3a8071",
            "publisher",
        ),
        Weights(
            "sam2-hiera-l",
            f"{META}/segment_anything_2/072824/sam2_hiera_large.pt",
            897_952_466,
            "7442e4e9b732a508f80e141e7c2913437a3610ee0c77381a66658c3a445df87b",
            "agreed",
        ),
        Weights(  # an image encoder for `label`, not a model
            "resnet50",
            "https://download.pytorch.org/models/resnet50-0676ba61.pth",
            102_530_333,
            "0676ba61b6795bbe1773cffd859882e5e297624d384b6993f7c9e683e722fb8a",
            "agreed",
        ),
    )
}


# --- looking up and checking files


def find(name: str) -> Weights:
    """Return the published weights of a model; raises UsageError if the name is not in the table."""
    if name == EMBEDDED:
        raise UsageError(f"{EMBEDDED} comes with refinetool: there is nothing to fetch or verify")
    try:
        return PUBLISHED[name]
    except KeyError:
        raise UsageError(f"there are no weights to fetch for {name!r}; {suggest(name, PUBLISHED)}") from None


def cache_folder() -> Path:
    """Return the folder of the weights, under `$REFINETOOL_CACHE` or the user's cache folder."""
    chosen = os.environ.get(CACHE_VARIABLE)
    return (user_path(chosen) if chosen else platformdirs.user_cache_path("refinetool")) / "weights"


def user_path(path: Path | str) -> Path:
    """Return a path with `~` replaced by the home folder; raises UsageError if `~name` names no user."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UsageError(
            f"{path}: there is no such user, so there is no home folder; write the path in full"
        ) from error


def listing() -> list[Status]:
    """Return the state of every file in the cache, quickly, from its size alone."""
    folder = cache_folder()
    return [_by_size(weights, folder) for weights in PUBLISHED.values()]


def verify(name: str) -> Status:
    """Check a cached file by its checksum. Raises UsageError for a name that is not in the table."""
    return check(find(name), cache_folder())


def check(weights: Weights, folder: Path) -> Status:
    """Check a file in a folder by its size and checksum."""
    seen = _by_size(weights, folder)
    if seen.state != "present":
        return seen
    found = sha256_of(seen.path)
    if found != weights.sha256:
        detail = f"sha256 is {found}, expected {weights.sha256}: not the published file"
        return Status(weights, seen.path, "damaged", detail)
    source = "recorded by its publisher" if weights.origin == "publisher" else "that independent projects agree on"
    return Status(weights, seen.path, "verified", f"sha256 is the one {source}")


def cached(name: str) -> tuple[Path, str]:
    """Return the verified file of a model and its sha256.

    Raises:
        WeightsError: The file is missing or not the published one; the message says how to get it.
    """
    status = verify(name)
    if status.state != "verified":
        way = f"run `refinetool models fetch {name}`, or {_by_hand(status.weights, status.path)}"
        raise WeightsError(f"the weights of {name} are not usable: {status.path}: {status.detail}. To get them, {way}")
    return status.path, status.weights.sha256


def sha256_of(path: Path) -> str:
    """Compute the hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _by_size(weights: Weights, folder: Path) -> Status:
    path = folder / weights.filename
    if path.is_file():
        size = path.stat().st_size
        if size == weights.size:
            return Status(weights, path, "present", "exists, not checked")
        return Status(weights, path, "damaged", f"has {size} bytes, expected {weights.size}")
    part = _part(path)
    if part.is_file():
        return Status(weights, path, "partial", f"{part.stat().st_size} of {weights.size} bytes are downloaded")
    return Status(weights, path, "missing", "does not exist")


# --- fetching


def fetch(name: str, *, on_progress: OnProgress) -> Path:
    """Download the weights of a model into the cache, unless they exist, and check them.

    An interrupted download continues where it stopped. A file with a wrong checksum is deleted and fetched once more.

    Raises:
        UsageError: The name is not in the table.
        WeightsError: No network, an unexpected response, or twice a wrong file; the message says how to fetch by hand.
        StorageError: The cache can't be written.
    """
    return download(find(name), cache_folder(), on_progress=on_progress)


def download(weights: Weights, folder: Path, *, on_progress: OnProgress) -> Path:
    """Do the same as `fetch` for one record and one folder."""
    path = folder / weights.filename
    part = _part(path)
    try:
        if check(weights, folder).state == "verified":
            on_progress(weights.size, weights.size)
            return path
        folder.mkdir(parents=True, exist_ok=True)
        for _ in range(2):
            _fill(part, weights, path, on_progress=on_progress)
            if sha256_of(part) == weights.sha256:
                part.replace(path)
                return path
            part.unlink()
    except RefinetoolError:
        raise
    except OSError as error:
        raise StorageError(f"{path} can't be written: {_reason(error)}; make room or set {CACHE_VARIABLE}") from error
    raise _failure(weights, path, "its sha256 is not the published one, twice, so nothing was kept")


def _fill(part: Path, weights: Weights, path: Path, *, on_progress: OnProgress) -> None:
    """Download the missing bytes of a partial file, and leave the file in place if the connection breaks."""
    there = part.stat().st_size if part.is_file() else 0
    if there > weights.size:
        part.unlink()
        there = 0
    if there == weights.size:
        return
    with _open(weights, path, start=there) as answer:
        if answer.status != http.HTTPStatus.PARTIAL_CONTENT:
            there = 0  # the server starts over
        _check_length(answer, weights, path, start=there)
        with part.open("ab" if there else "wb") as file:
            on_progress(there, weights.size)
            while there < weights.size and (chunk := _read(answer, weights, path, at_most=weights.size - there)):
                file.write(chunk)
                there += len(chunk)
                on_progress(there, weights.size)
    if there < weights.size:
        raise _failure(
            weights, path, f"the download ended after {there} of {weights.size} bytes; fetch again to continue"
        )


def _open(weights: Weights, path: Path, *, start: int) -> http.client.HTTPResponse:
    request = urllib.request.Request(weights.url, headers={"User-Agent": "refinetool"})
    if start:
        request.add_header("Range", f"bytes={start}-")
    try:
        answer: http.client.HTTPResponse = urllib.request.urlopen(request, timeout=TIMEOUT_S)
    except urllib.error.HTTPError as error:
        error.close()
        raise _failure(weights, path, f"the server answered {error.code} {error.reason}") from error
    except (urllib.error.URLError, OSError, http.client.HTTPException) as error:
        raise _failure(weights, path, f"there is no connection ({_reason(error)})") from error
    return answer


def _check_length(answer: http.client.HTTPResponse, weights: Weights, path: Path, *, start: int) -> None:
    """Refuse a file of another length before it is downloaded, such as a login page."""
    length = answer.headers.get("Content-Length")
    if length is not None and start + int(length) != weights.size:
        found = start + int(length)
        raise _failure(weights, path, f"the server offers {found} bytes, expected {weights.size}: another file")


def _read(answer: http.client.HTTPResponse, weights: Weights, path: Path, *, at_most: int) -> bytes:
    try:
        return answer.read(min(CHUNK, at_most))
    except http.client.IncompleteRead as error:
        return error.partial
    except (OSError, http.client.HTTPException) as error:
        raise _failure(
            weights, path, f"the connection broke off ({_reason(error)}); fetch again to continue"
        ) from error


def _failure(weights: Weights, path: Path, what: str) -> WeightsError:
    return WeightsError(f"{weights.url} could not be fetched: {what}. By hand: {_by_hand(weights, path)}")


def _by_hand(weights: Weights, path: Path) -> str:
    return f"download {weights.url} with any other tool and put it at {path}, or name your copy with --checkpoint PATH"


def _reason(error: BaseException) -> str:
    reason = getattr(error, "reason", None) or error
    return str(getattr(reason, "strerror", None) or reason or type(reason).__name__)


def _part(path: Path) -> Path:
    return path.with_name(path.name + ".part")
