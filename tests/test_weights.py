"""Fetching and checking weights, against a server on this machine."""

import hashlib
import http.server
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from refinetool.backends import weights
from refinetool.backends.weights import PUBLISHED, Weights, cached, check, fetch, find, listing, verify
from refinetool.errors import StorageError, UsageError, WeightsError

CONTENT = bytes(range(256)) * 20_000  # 5 MB: several chunks
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@dataclass
class Site:
    """What the server does, and what it was asked."""

    address: str = ""
    body: bytes = CONTENT
    status: int = 200
    ranges: bool = True
    break_off_after: list[int] = field(default_factory=list)
    """Bytes after which each further answer breaks off."""
    asked: list[str | None] = field(default_factory=list)
    """The Range header of each request."""


@pytest.fixture
def site() -> Iterator[Site]:
    state = Site()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            wanted = self.headers.get("Range")
            state.asked.append(wanted)
            if state.status != 200:
                self.send_error(state.status)
                return
            start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and state.ranges else 0
            body = state.body[start:]
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(body)))
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(state.body) - 1}/{len(state.body)}")
            self.end_headers()
            self.wfile.write(body[: state.break_off_after.pop(0)] if state.break_off_after else body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    state.address = f"http://127.0.0.1:{server.server_port}/toy.pth"
    yield state
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def toy(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Publishes one model, `toy`, at the server; returns where its file belongs."""
    monkeypatch.setenv("REFINETOOL_CACHE", str(tmp_path))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setitem(PUBLISHED, "toy", Weights("toy", site.address, len(CONTENT), DIGEST, "agreed"))
    return tmp_path / "weights" / "toy.pth"


def quiet(done: int, total: int) -> None:
    assert 0 <= done <= total == len(CONTENT)


def part_of(path: Path) -> Path:
    return path.with_name(path.name + ".part")


# --- the table


def test_the_table_is_well_formed() -> None:
    assert len(PUBLISHED) == 16
    for name, record in PUBLISHED.items():
        assert record.model == name
        assert len(record.sha256) == 64
        assert int(record.sha256, 16) >= 0
        assert record.size > 40_000_000
        assert record.url.startswith("https://")
        assert record.filename.endswith((".pth", ".pt"))
    assert len({record.sha256 for record in PUBLISHED.values()}) == 16
    assert len({record.filename for record in PUBLISHED.values()}) == 16


def test_an_unknown_name_gets_the_nearest_one() -> None:
    assert find("sam-vit-h").filename == "sam_vit_h_4b8939.pth"
    with pytest.raises(UsageError, match=r"'sam-vit-x'; did you mean sam-vit-"):
        find("sam-vit-x")


# --- fetching


def test_a_download_ends_up_whole(site: Site, toy: Path) -> None:
    seen: list[tuple[int, int]] = []
    assert fetch("toy", on_progress=lambda done, total: seen.append((done, total))) == toy
    assert toy.read_bytes() == CONTENT
    assert sorted(toy.parent.iterdir()) == [toy], "nothing is left beside it"
    assert seen[0] == (0, len(CONTENT))
    assert seen[-1] == (len(CONTENT), len(CONTENT))
    assert seen == sorted(seen)
    assert site.asked == [None]


def test_what_is_there_is_not_fetched_again(site: Site, toy: Path) -> None:
    fetch("toy", on_progress=quiet)
    site.status = 500
    assert fetch("toy", on_progress=quiet) == toy


def test_a_truncated_download_continues(site: Site, toy: Path) -> None:
    site.break_off_after = [3_000_000]
    with pytest.raises(WeightsError, match="ended after 3000000 of 5120000 bytes; fetch again to continue"):
        fetch("toy", on_progress=quiet)
    assert not toy.exists()
    assert verify("toy").state == "partial"
    assert fetch("toy", on_progress=quiet).read_bytes() == CONTENT
    assert site.asked == [None, "bytes=3000000-"]


@pytest.mark.usefixtures("toy")
def test_a_server_without_ranges_starts_over(site: Site) -> None:
    site.break_off_after, site.ranges = [3_000_000], False
    with pytest.raises(WeightsError, match="fetch again"):
        fetch("toy", on_progress=quiet)
    assert fetch("toy", on_progress=quiet).read_bytes() == CONTENT


def test_a_complete_part_needs_no_server(site: Site, toy: Path) -> None:
    toy.parent.mkdir()
    part_of(toy).write_bytes(CONTENT)
    assert fetch("toy", on_progress=quiet).read_bytes() == CONTENT
    assert site.asked == []


def test_a_spoiled_part_is_dropped_and_fetched_once_more(site: Site, toy: Path) -> None:
    toy.parent.mkdir()
    part_of(toy).write_bytes(b"?" * 1000)
    assert fetch("toy", on_progress=quiet).read_bytes() == CONTENT
    assert site.asked == ["bytes=1000-", None]


def test_a_part_that_is_too_long_is_dropped(site: Site, toy: Path) -> None:
    toy.parent.mkdir()
    part_of(toy).write_bytes(CONTENT + b"?")
    assert fetch("toy", on_progress=quiet).read_bytes() == CONTENT
    assert site.asked == [None]


def test_a_tampered_file_is_refused_after_two_tries(site: Site, toy: Path) -> None:
    site.body = b"?" + CONTENT[1:]
    with pytest.raises(WeightsError, match="its sha256 is not the published one, twice") as caught:
        fetch("toy", on_progress=quiet)
    assert len(site.asked) == 2
    assert list(toy.parent.iterdir()) == []
    for way in (site.address, str(toy), "--checkpoint PATH"):
        assert way in str(caught.value)


def test_a_file_of_another_length_is_refused_unread(site: Site, toy: Path) -> None:
    site.body = b"<html>please log in</html>"
    with pytest.raises(WeightsError, match="offers 26 bytes, expected 5120000: another file"):
        fetch("toy", on_progress=quiet)
    assert not part_of(toy).exists()


def test_a_missing_page_is_told(site: Site, toy: Path) -> None:
    site.status = 404
    with pytest.raises(WeightsError, match="the server answered 404 Not Found") as caught:
        fetch("toy", on_progress=quiet)
    assert str(toy) in str(caught.value)


def test_no_server_is_told(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{taken.getsockname()[1]}/toy.pth"
    monkeypatch.setitem(PUBLISHED, "toy", replace(PUBLISHED["toy"], url=closed))
    with pytest.raises(WeightsError, match=r"there is no connection \(Connection refused\)") as caught:
        fetch("toy", on_progress=quiet)
    for way in (closed, str(toy), "--checkpoint PATH"):
        assert way in str(caught.value)


@pytest.mark.usefixtures("toy")
def test_a_cache_that_cannot_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("REFINETOOL_CACHE", str(tmp_path / "file"))
    with pytest.raises(StorageError, match=r"toy\.pth can't be written: Not a directory; make room or set REFINETOOL_"):
        fetch("toy", on_progress=quiet)


# --- checking


def test_states_of_a_file(toy: Path) -> None:
    assert verify("toy").state == "missing"
    toy.parent.mkdir()
    part_of(toy).write_bytes(CONTENT[:10])
    assert verify("toy").detail == "10 of 5120000 bytes are downloaded"
    toy.write_bytes(CONTENT[:-1])
    assert verify("toy").state == "damaged"
    assert verify("toy").detail == "has 5119999 bytes, expected 5120000"
    toy.write_bytes(CONTENT[:-1] + b"?")
    assert verify("toy").state == "damaged"
    assert f"expected {DIGEST}" in verify("toy").detail
    toy.write_bytes(CONTENT)
    assert verify("toy").state == "verified"


def test_a_verdict_says_who_vouches(toy: Path) -> None:
    toy.parent.mkdir()
    toy.write_bytes(CONTENT)
    record = find("toy")
    assert check(record, toy.parent).detail == "sha256 is the one that independent projects agree on"
    assert (
        check(replace(record, origin="publisher"), toy.parent).detail == "sha256 is the one recorded by its publisher"
    )


def test_the_listing_reads_no_file(toy: Path) -> None:
    toy.parent.mkdir()
    toy.write_bytes(b"?" * len(CONTENT))
    states = {status.weights.model: status.state for status in listing()}
    assert states["toy"] == "present"
    assert states["sam-vit-b"] == "missing"
    assert list(states) == list(PUBLISHED)


def test_only_verified_files_are_used(toy: Path) -> None:
    toy.parent.mkdir()
    toy.write_bytes(b"?" + CONTENT[1:])
    with pytest.raises(WeightsError, match="not the published file") as caught:
        cached("toy")
    assert "refinetool models fetch toy" in str(caught.value)
    toy.write_bytes(CONTENT)
    assert cached("toy") == (toy, DIGEST)


def test_a_damaged_file_is_replaced(site: Site, toy: Path) -> None:
    toy.parent.mkdir()
    toy.write_bytes(b"?" * len(CONTENT))
    assert fetch("toy", on_progress=quiet).read_bytes() == CONTENT
    assert site.asked == [None]


def test_the_cache_is_the_platforms_unless_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("REFINETOOL_CACHE", str(tmp_path))
    assert weights.cache_folder() == tmp_path / "weights"
    monkeypatch.delenv("REFINETOOL_CACHE")
    monkeypatch.setattr(weights.platformdirs, "user_cache_path", lambda app: tmp_path / "caches" / app)
    assert weights.cache_folder() == tmp_path / "caches" / "refinetool" / "weights"
