"""The journal: what was finished comes back, what is torn or no longer true does not."""

import errno
import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from refinetool.errors import DataError, StorageError, UsageError
from refinetool.records import Annotation, Outcome, Region, Rle, Sample
from refinetool.running.journal import Journal, digest_of, holds_work, journal_path
from refinetool.statuses import Reason

JOB = {"settings": {"passes": 1}, "model": "abc"}
MASK = Rle((4, 5), b"5123`O\\")


def sample_of(folder: Path, key: str) -> Sample:
    image = folder / f"{key}.jpg"
    if not image.exists():
        image.write_bytes(b"pixels")
    return Sample(key, image, (4, 5), (Region(7, 3, MASK), Region(8, None, None, keep=Reason.EMPTY)))


def outcome_of(key: str, *, score: float = 0.75, error: str | None = None) -> Outcome:
    return Outcome(key, (Annotation(MASK, None, score, 0.5), Annotation(None, Reason.EMPTY)), error)


def finish(journal: Journal, sample: Sample, outcome: Outcome) -> None:
    assert journal.reuse(sample) is None
    journal.append(outcome, seconds=0.5)


def filled(path: Path, keys: str) -> bytes:
    """A journal of an earlier run with these samples."""
    with Journal(path, job=JOB, fresh=False) as journal:
        for key in keys:
            finish(journal, sample_of(path.parent, key), outcome_of(key))
    return path.read_bytes()


def reused(path: Path, keys: str, *, job: dict[str, object] = JOB) -> str:
    with Journal(path, job=job, fresh=False) as journal:
        return "".join(key for key in keys if journal.reuse(sample_of(path.parent, key)) is not None)


finite = st.none() | st.floats(0, 1)
masks = st.none() | st.builds(
    Rle,
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.binary(max_size=9).map(lambda b: bytes(48 + c % 64 for c in b)),
)
annotations = st.builds(Annotation, masks, st.sampled_from(Reason) | st.none(), finite, finite)
outcomes = st.builds(Outcome, st.text(), st.lists(annotations, max_size=3).map(tuple), st.none() | st.text())


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(outcome=outcomes)
def test_what_goes_in_comes_out(tmp_path: Path, outcome: Outcome) -> None:
    sample = replace(sample_of(tmp_path, "a"), key=outcome.key)
    with Journal(tmp_path / "j", job=JOB, fresh=True) as journal:
        finish(journal, sample, outcome)
        assert journal.find(outcome.key) == outcome
    with Journal(tmp_path / "j", job=JOB, fresh=False) as journal:
        assert journal.reuse(sample) == (outcome if outcome.error is None else None)


def test_lines_are_plain_json_for_other_tools(tmp_path: Path) -> None:
    header, line = filled(tmp_path / "j", "a").splitlines()
    assert json.loads(header)["about"] == JOB
    record = json.loads(line)
    assert (record["key"], record["seconds"], record["error"]) == ("a", 0.5, None)
    assert record["annotations"] == [
        {"kept": None, "predicted_iou": 0.75, "coarse_iou": 0.5, "size": [4, 5], "counts": "5123`O\\"},
        {"kept": "empty", "predicted_iou": None, "coarse_iou": None, "size": None, "counts": None},
    ]


def test_numpy_scores_are_written_as_numbers(tmp_path: Path) -> None:
    with Journal(tmp_path / "j", job=JOB, fresh=False) as journal:
        finish(journal, sample_of(tmp_path, "a"), outcome_of("a", score=np.float32(0.75)))  # type: ignore[arg-type]
        assert journal.find("a") == outcome_of("a")


def test_find_knows_only_what_this_run_finished_or_took_over(tmp_path: Path) -> None:
    filled(tmp_path / "j", "ab")
    with Journal(tmp_path / "j", job=JOB, fresh=False) as journal:
        assert journal.find("a") is None
        assert journal.reuse(sample_of(tmp_path, "a")) == outcome_of("a")
        assert journal.find("a") == outcome_of("a")
        assert journal.find("b") is None
        assert len(journal) == 1


def test_nothing_is_written_twice_on_resume(tmp_path: Path) -> None:
    before = filled(tmp_path / "j", "ab")
    assert reused(tmp_path / "j", "ab") == "ab"
    assert (tmp_path / "j").read_bytes() == before


@pytest.mark.parametrize("cut", range(1, 40, 3))
def test_a_torn_last_line_is_dropped_and_its_sample_done_again(tmp_path: Path, cut: int) -> None:
    whole = filled(tmp_path / "j", "abc")
    (tmp_path / "j").write_bytes(whole[:-cut])
    assert reused(tmp_path / "j", "abc") == "ab"
    with Journal(tmp_path / "j", job=JOB, fresh=False) as journal:
        for key in "ab":
            journal.reuse(sample_of(tmp_path, key))
        finish(journal, sample_of(tmp_path, "c"), outcome_of("c"))
    assert (tmp_path / "j").read_bytes() == whole


@pytest.mark.parametrize("kept_bytes", [0, 1, 10, 60])
def test_a_torn_header_is_an_empty_journal(tmp_path: Path, kept_bytes: int) -> None:
    whole = filled(tmp_path / "j", "a")
    (tmp_path / "j").write_bytes(whole[:kept_bytes])
    assert not holds_work(tmp_path / "j")
    assert filled(tmp_path / "j", "a") == whole


def test_a_broken_line_in_the_middle_costs_only_its_sample(tmp_path: Path) -> None:
    lines = filled(tmp_path / "j", "abc").splitlines(keepends=True)
    lines[2] = b"\0" * (len(lines[2]) - 1) + b"\n"
    (tmp_path / "j").write_bytes(b"".join(lines))
    assert reused(tmp_path / "j", "abc") == "ac"


@pytest.mark.parametrize(
    ("old", "new"),
    [(b"0.75", b"0.15"), (b"5123`O", b"5124`O"), (b'"input"', b'"inputs"'), (b'"key": "b"', b'"key": 1')],
)
def test_a_line_that_was_edited_is_done_again(tmp_path: Path, old: bytes, new: bytes) -> None:
    lines = filled(tmp_path / "j", "abc").splitlines(keepends=True)
    lines[2] = lines[2].replace(old, new)
    assert json.loads(lines[2])
    (tmp_path / "j").write_bytes(b"".join(lines))
    assert reused(tmp_path / "j", "abc") == "ac"


def test_lines_below_a_damaged_header_are_not_taken_for_those_of_the_job_before(tmp_path: Path) -> None:
    filled(tmp_path / "j", "a")
    with Journal(tmp_path / "j", job={**JOB, "model": "xyz"}, fresh=False) as journal:
        finish(journal, sample_of(tmp_path, "b"), outcome_of("b"))
    lines = (tmp_path / "j").read_bytes().splitlines(keepends=True)
    lines[2] = lines[2].replace(b"refinetool_journal", b"refinetool_diary")
    (tmp_path / "j").write_bytes(b"".join(lines))
    assert reused(tmp_path / "j", "ab") == "a"


@pytest.mark.parametrize("line", ["[]", "7", '{"key": []}', "[" * 1500 + "]" * 1500, '{"key": "a", "input": 1}'])
def test_a_line_of_another_shape_is_ignored(tmp_path: Path, line: str) -> None:
    whole = filled(tmp_path / "j", "ab")
    (tmp_path / "j").write_bytes(whole + line.encode() + b"\n")
    assert reused(tmp_path / "j", "ab") == "ab"
    (tmp_path / "j").write_bytes(whole.splitlines(keepends=True)[0] + line.encode() + b"\n")
    assert not holds_work(tmp_path / "j")


def test_a_line_that_changes_while_it_is_in_use_is_refused(tmp_path: Path) -> None:
    with Journal(tmp_path / "j", job=JOB, fresh=False) as journal:
        finish(journal, sample_of(tmp_path, "a"), outcome_of("a"))
        (tmp_path / "j").write_bytes((tmp_path / "j").read_bytes().replace(b"0.75", b"0.15"))
        with pytest.raises(DataError, match="was changed while it was in use"):
            journal.find("a")


def test_the_last_line_of_a_key_wins(tmp_path: Path) -> None:
    first = filled(tmp_path / "j", "a")
    (tmp_path / "j").unlink()
    with Journal(tmp_path / "j", job=JOB, fresh=True) as journal:
        finish(journal, sample_of(tmp_path, "a"), outcome_of("a", score=0.25))
    second = (tmp_path / "j").read_bytes().splitlines(keepends=True)[1]
    (tmp_path / "j").write_bytes(first + second)
    with Journal(tmp_path / "j", job=JOB, fresh=False) as journal:
        assert journal.reuse(sample_of(tmp_path, "a")) == outcome_of("a", score=0.25)


def test_samples_of_another_job_are_known_but_not_used(tmp_path: Path) -> None:
    other = {**JOB, "model": "xyz"}
    filled(tmp_path / "j", "ab")
    with Journal(tmp_path / "j", job=other, fresh=False) as journal:
        assert journal.knows("a")
        assert not journal.knows("z")
        finish(journal, sample_of(tmp_path, "a"), outcome_of("a", score=0.25))
    assert reused(tmp_path / "j", "ab", job=other) == "a"
    assert reused(tmp_path / "j", "ab") == "ab", "back to the first settings: their lines are still there"


def test_a_job_is_the_same_in_whatever_order_it_is_told(tmp_path: Path) -> None:
    filled(tmp_path / "j", "ab")
    assert reused(tmp_path / "j", "ab", job=dict(reversed(JOB.items()))) == "ab"


def test_a_sample_with_an_error_is_tried_again(tmp_path: Path) -> None:
    with Journal(tmp_path / "j", job=JOB, fresh=False) as journal:
        finish(journal, sample_of(tmp_path, "a"), outcome_of("a", error="a.jpg is broken"))
    assert reused(tmp_path / "j", "a") == ""


def test_any_change_of_the_input_changes_the_digest(tmp_path: Path) -> None:
    sample = sample_of(tmp_path, "a")
    first, second = sample.regions
    moved = tmp_path / "moved.jpg"
    os.link(sample.image, moved)
    assert digest_of(replace(sample, image=moved)) == digest_of(sample), "a path is not content"
    changed = [
        replace(sample, regions=(second, first)),
        replace(sample, regions=(first,)),
        replace(sample, regions=(replace(first, mask=Rle((4, 5), b"5123`O]")), second)),
        replace(sample, regions=(replace(first, category=4), second)),
        replace(sample, regions=(replace(first, keep=Reason.CROWD), second)),
        replace(sample, layout="semantic"),
        replace(sample, void=MASK),
        replace(sample, image=tmp_path / "absent.jpg"),
    ]
    digests = [digest_of(sample), *map(digest_of, changed)]
    before = sample.image.stat()
    os.utime(sample.image, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    digests.append(digest_of(sample))
    sample.image.write_bytes(b"other pixels")
    os.utime(sample.image, ns=(before.st_atime_ns, before.st_mtime_ns))
    digests.append(digest_of(sample))
    assert len(set(digests)) == len(digests)


def test_an_image_that_changed_is_done_again(tmp_path: Path) -> None:
    filled(tmp_path / "j", "ab")
    (tmp_path / "a.jpg").write_bytes(b"other pixels")
    assert reused(tmp_path / "j", "ab") == "b"


def test_fresh_drops_what_was_there(tmp_path: Path) -> None:
    filled(tmp_path / "j", "ab")
    assert holds_work(tmp_path / "j")
    with Journal(tmp_path / "j", job=JOB, fresh=True) as journal:
        assert not journal.knows("a")
    assert not holds_work(tmp_path / "j")


def test_the_journal_lies_beside_file_or_folder() -> None:
    assert journal_path(Path("x/out.json")) == Path("x/out.json.journal.jsonl")
    assert journal_path(Path("x/masks")) == Path("x/masks.journal.jsonl")


def test_remove(tmp_path: Path) -> None:
    filled(tmp_path / "j", "a")
    journal = Journal(tmp_path / "j", job=JOB, fresh=False)
    journal.remove()
    journal.close()
    assert not (tmp_path / "j").exists()
    assert not holds_work(tmp_path / "j")


@pytest.mark.parametrize("fresh", [True, False])
def test_a_file_that_is_no_journal_is_left_alone(tmp_path: Path, fresh: bool) -> None:
    (tmp_path / "j").write_text('{"precious": true}\n')
    with pytest.raises(UsageError, match="something else"):
        holds_work(tmp_path / "j")
    with pytest.raises(UsageError, match="something else"):
        Journal(tmp_path / "j", job=JOB, fresh=fresh)
    assert (tmp_path / "j").read_text() == '{"precious": true}\n'


def test_a_folder_that_can_not_be_written(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="No such file"):
        Journal(tmp_path / "absent" / "j", job=JOB, fresh=False)
    with pytest.raises(StorageError, match="directory"):
        holds_work(tmp_path)


def test_a_second_run_on_the_same_journal_is_refused(tmp_path: Path) -> None:
    with Journal(tmp_path / "j", job=JOB, fresh=False):
        for fresh in (True, False):
            with pytest.raises(UsageError, match="another run"):
                Journal(tmp_path / "j", job=JOB, fresh=fresh)


def test_where_files_have_no_locks_a_run_goes_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", unsupported)
    filled(tmp_path / "j", "ab")
    assert reused(tmp_path / "j", "ab") == "ab"


@contextmanager
def disk_full_at(size: int) -> Iterator[None]:
    """Let no file of this process grow beyond `size` bytes: the write that crosses it is cut short, the next fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_loses_nothing_that_was_finished(tmp_path: Path) -> None:
    whole = filled(tmp_path / "full", "abc")
    size = len(filled(tmp_path / "j", "ab"))
    with (
        disk_full_at(size + 20),
        Journal(tmp_path / "j", job=JOB, fresh=False) as journal,
        pytest.raises(StorageError, match=r"j: the journal can't be written: .*--resume, the 2 images"),
    ):
        for key in "ab":
            assert journal.reuse(sample_of(tmp_path, key)) is not None
        finish(journal, sample_of(tmp_path, "c"), outcome_of("c"))
    assert (tmp_path / "j").read_bytes() == whole[:size]
    assert reused(tmp_path / "j", "abc") == "ab"


def test_no_space_left_is_said_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def write(self, _: bytes) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def truncate(self, _: int) -> int:
            raise OSError(errno.EIO, "not even that")

    with Journal(tmp_path / "j", job=JOB, fresh=False) as journal:
        journal.reuse(sample_of(tmp_path, "a"))
        with monkeypatch.context() as patched:
            patched.setattr(journal._lines, "_file", Full())
            with pytest.raises(StorageError, match="No space left on device"):
                journal.append(outcome_of("a"), seconds=0)
        assert journal.find("a") is None


def test_every_line_survives_a_kill(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys; sys.path.insert(0, sys.argv[1]); import test_journal as t; from pathlib import Path\n"
        "folder = Path(sys.argv[2]); journal = t.Journal(folder / 'j', job=t.JOB, fresh=False)\n"
        "for key in 'ab': t.finish(journal, t.sample_of(folder, key), t.outcome_of(key))\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    command = [sys.executable, "-c", script, str(Path(__file__).parent), str(tmp_path)]
    assert subprocess.run(command, check=False).returncode == -9
    assert reused(tmp_path / "j", "abc") == "ab"
