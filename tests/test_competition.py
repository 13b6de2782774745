"""Objects that compete for pixels, against the same computed on whole images, pixel by pixel."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st

from refinetool.candidates import Answer, Job
from refinetool.competition import are_rivals, compete
from refinetool.masks import chances
from refinetool.records import Box, FloatMap, Mask, Prompts
from refinetool.regions import Part
from refinetool.settings import CompetitionSettings
from refinetool.views import View

HEIGHT, WIDTH = 24, 30
HALF = CompetitionSettings(weight=0.5, max_shared=0.5)
NO_PROMPTS = Prompts(np.zeros((0, 0, 2), np.float32), np.zeros((0, 0), np.int64), None, None)


def part_of(region: int, box: Box, mask: Mask | None = None, number: int = 0) -> Part:
    x0, y0, x1, y1 = box
    return Part(region, number, box, np.ones((y1 - y0, x1 - x0), np.bool_) if mask is None else mask)


def asked(window: Box, parts: Sequence[Part], logits: Sequence[FloatMap]) -> tuple[Job, Answer]:
    """A job and its answer, with one logit for each pixel of the view."""
    view = View(window)
    grid = np.stack(logits).astype(np.float32)
    job = Job(view, tuple(parts), np.zeros((*view.size, 3), np.uint8), grid > 0, None, NO_PROMPTS, ((),) * len(parts))
    return job, Answer(grid > 0, np.full(len(parts), 0.5, np.float32), grid)


def separate(boxes: Sequence[Box], logits: Sequence[FloatMap]) -> tuple[list[Job], list[Answer]]:
    """Objects that each have the whole image as their view."""
    pairs = [
        asked((0, 0, WIDTH, HEIGHT), [part_of(n, box)], [one])
        for n, (box, one) in enumerate(zip(boxes, logits, strict=True))
    ]
    return [job for job, _ in pairs], [answer for _, answer in pairs]


boxes = st.builds(
    lambda x, y, w, h: (x, y, min(x + w, WIDTH), min(y + h, HEIGHT)),
    st.integers(0, WIDTH - 1),
    st.integers(0, HEIGHT - 1),
    st.integers(1, WIDTH),
    st.integers(1, HEIGHT),
)


@st.composite
def images(draw: st.DrawFn) -> tuple[list[Job], list[Answer]]:
    """Some objects, each in a window around its box; two in a row may be parts of one region."""
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    jobs, answers, region = [], [], 0
    for _ in range(draw(st.integers(1, 5))):
        x0, y0, x1, y1 = box = draw(boxes)
        window = (max(0, x0 - 3), max(0, y0 - 3), min(WIDTH, x1 + 3), min(HEIGHT, y1 + 3))
        size = window[3] - window[1], window[2] - window[0]
        coarse = rng.random((y1 - y0, x1 - x0)) < 0.7
        coarse[0, 0] = True
        region += draw(st.integers(0, 1))
        job, answer = asked(window, [part_of(region, box, coarse)], [rng.normal(0, 4, size)])
        jobs.append(job)
        answers.append(answer)
    return jobs, answers


def on_image(job: Job, values: np.ndarray, *, outside: float) -> np.ndarray:
    whole = np.full((HEIGHT, WIDTH), outside)
    x0, y0, x1, y1 = job.view.window
    whole[y0:y1, x0:x1] = values
    return whole


def coarse_on_image(part: Part) -> np.ndarray:
    whole = np.zeros((HEIGHT, WIDTH), np.bool_)
    x0, y0, x1, y1 = part.box
    whole[y0:y1, x0:x1] = part.mask
    return whole


@limits(deadline=None)
@given(image=images(), weight=st.sampled_from([0.3, 0.5, 1.0]))
def test_logits_are_lowered_as_on_the_whole_image(image: tuple[list[Job], list[Answer]], weight: float) -> None:
    jobs, answers = image
    found = compete(jobs, answers, settings=CompetitionSettings(weight=weight, max_shared=0.5))
    logits = [
        on_image(job, answer.logits[0], outside=-np.inf)
        for job, answer in zip(jobs, answers, strict=True)
        if answer.logits is not None
    ]
    coarse = [coarse_on_image(job.parts[0]) for job in jobs]
    for i, (job, result) in enumerate(zip(jobs, found, strict=True)):
        expected = logits[i].copy()
        for j, other in enumerate(jobs):
            smaller = min(coarse[i].sum(), coarse[j].sum())
            if other.parts[0].region != job.parts[0].region and (coarse[i] & coarse[j]).sum() <= 0.5 * smaller:
                expected += weight * np.log(1 - 1 / (1 + np.exp(-logits[j])))
        x0, y0, x1, y1 = job.view.window
        assert result.logits is not None
        # Pixels with a probability below 2 % need not count.
        np.testing.assert_allclose(result.logits[0], expected[y0:y1, x0:x1], atol=0.021 * weight * len(jobs) + 1e-4)
        sure = abs(expected[y0:y1, x0:x1]) > 0.1
        assert (result.masks[0] == (result.logits[0] > 0))[sure].all()


@given(image=images())
def test_the_order_of_objects_does_not_matter(image: tuple[list[Job], list[Answer]]) -> None:
    jobs, answers = image
    found = compete(jobs, answers, settings=HALF)
    backwards = compete(jobs[::-1], answers[::-1], settings=HALF)[::-1]
    for one, other in zip(found, backwards, strict=True):
        assert one.logits is not None and other.logits is not None
        np.testing.assert_allclose(one.logits, other.logits, atol=1e-4)


@given(image=images())
def test_masks_only_lose_pixels(image: tuple[list[Job], list[Answer]]) -> None:
    jobs, answers = image
    # The backend interpolates masks in its own way, so a pixel may be left out although its logit is positive.
    some = np.random.default_rng(1)
    answers = [replace(answer, masks=answer.masks & (some.random(answer.masks.shape) < 0.8)) for answer in answers]
    for before, after in zip(answers, compete(jobs, answers, settings=HALF), strict=True):
        assert not (after.masks & ~before.masks).any()
        assert (before.predicted_iou == after.predicted_iou).all()


def ramp(*, rising: bool) -> FloatMap:
    """Logits from -4 to 8 across the image, or the reverse."""
    steps = np.linspace(-6, 6, WIDTH, dtype=np.float32)
    line = (steps if rising else steps[::-1]) + np.float32(2)
    return np.broadcast_to(line, (HEIGHT, WIDTH)).copy()


def test_a_pixel_that_two_claim_goes_to_the_surer_one() -> None:
    jobs, answers = separate([(0, 0, 12, HEIGHT), (18, 0, WIDTH, HEIGHT)], [ramp(rising=False), ramp(rising=True)])
    assert (answers[0].masks & answers[1].masks).any()
    left, right = (answer.masks[0] for answer in compete(jobs, answers, settings=CompetitionSettings(1.0, 0.5)))
    assert not (left & right).any()
    assert left[:, : WIDTH // 2 - 1].all()
    assert right[:, WIDTH // 2 + 1 :].all()


@pytest.mark.parametrize(("probability", "kept"), [(0.6, False), (0.64, True), (0.99, True)])
def test_two_that_are_equally_sure_both_keep_a_pixel_or_neither(probability: float, kept: bool) -> None:
    logits = np.full((HEIGHT, WIDTH), np.log(probability / (1 - probability)), np.float32)
    jobs, answers = separate([(0, 0, 12, HEIGHT), (18, 0, WIDTH, HEIGHT)], [logits, logits])
    assert [answer.masks.all() for answer in compete(jobs, answers, settings=HALF)] == [kept, kept]


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ((part_of(0, (0, 0, 10, 10)), part_of(1, (20, 20, 24, 24))), True),
        ((part_of(0, (0, 0, 10, 10)), part_of(1, (5, 0, 15, 10))), True),  # exactly half is shared
        ((part_of(0, (0, 0, 10, 10)), part_of(1, (4, 0, 14, 10))), False),
        ((part_of(0, (0, 0, 10, 10)), part_of(1, (3, 3, 5, 5))), False),  # a plate on a table
        ((part_of(0, (0, 0, 10, 10)), part_of(0, (20, 20, 24, 24), number=1)), False),  # two parts of a class
    ],
)
def test_who_competes(parts: tuple[Part, Part], expected: bool) -> None:
    one, other = parts
    assert are_rivals(one, other, max_shared=0.5) == expected
    assert are_rivals(other, one, max_shared=0.5) == expected


def test_nothing_changes_without_weight_without_rivals_and_without_logits() -> None:
    jobs, answers = separate([(0, 0, 12, HEIGHT), (18, 0, WIDTH, HEIGHT)], [ramp(rising=False), ramp(rising=True)])
    unchanged = compete(jobs, answers, settings=CompetitionSettings(weight=0.0))
    assert all(one is other for one, other in zip(answers, unchanged, strict=True))
    (alone,) = compete(jobs[:1], answers[:1], settings=HALF)
    assert (alone.masks == answers[0].masks).all()
    assert alone.logits is not None and answers[0].logits is not None
    assert (alone.logits == answers[0].logits).all()
    silent = [replace(answer, logits=None) for answer in answers]
    assert all(one is other for one, other in zip(silent, compete(jobs, silent, settings=HALF), strict=True))


def test_rivals_elsewhere_change_nothing() -> None:
    window, far = (0, 0, 10, 10), (12, 12, 20, 20)
    logits = np.full((10, 10), 4.0, np.float32)
    logits[:, :5] = -1.0
    pairs = [
        asked(window, [part_of(0, window)], [logits]),
        asked(far, [part_of(1, far)], [logits[:8, :8]]),
    ]
    mask = np.ones((1, 10, 10), np.bool_)
    mask[0, :, 5:] = False  # as if the backend had interpolated otherwise
    jobs, answers = [job for job, _ in pairs], [replace(pairs[0][1], masks=mask), pairs[1][1]]
    first, _ = compete(jobs, answers, settings=HALF)
    assert (first.masks == mask).all()


def test_a_weak_claim_counts() -> None:
    own, rival = (np.full((HEIGHT, WIDTH), value, np.float32) for value in (2.0, np.log(0.1 / 0.9)))
    jobs, answers = separate([(0, 0, 12, HEIGHT), (18, 0, WIDTH, HEIGHT)], [own, rival])
    first, _ = compete(jobs, answers, settings=HALF)
    assert first.logits is not None
    np.testing.assert_allclose(first.logits, 2.0 + 0.5 * np.log(0.9), atol=1e-5)


def test_answers_that_claim_nothing_are_no_rivals() -> None:
    nothing = np.full((HEIGHT, WIDTH), -9, np.float32)
    jobs, answers = separate([(0, 0, 12, HEIGHT), (18, 0, WIDTH, HEIGHT)], [ramp(rising=False), nothing])
    first, _ = compete(jobs, answers, settings=HALF)
    assert first.logits is not None and answers[0].logits is not None
    assert (first.logits == answers[0].logits).all()


def test_a_broken_answer_does_no_harm() -> None:
    broken = np.full((HEIGHT, WIDTH), np.nan, np.float32)
    broken[:, 18:] = 9
    jobs, answers = separate([(0, 0, 12, HEIGHT), (18, 0, WIDTH, HEIGHT)], [ramp(rising=False), broken])
    first, _ = compete(jobs, answers, settings=HALF)
    assert first.logits is not None and answers[0].logits is not None
    assert (first.logits[..., :18] == answers[0].logits[..., :18]).all()
    assert (first.logits[..., 18:] < answers[0].logits[..., 18:]).all()


def test_logits_on_a_coarser_grid_get_the_mean_of_their_pixels() -> None:
    rng = np.random.default_rng(3)
    own, rival = rng.normal(0, 3, (2, 8, 16)).astype(np.float32)
    grid, view = (0, 0, 16, 8), View((0, 0, 32, 24))
    pairs = [
        asked(grid, [part_of(0, (0, 0, 10, 16))], [own]),
        asked(grid, [part_of(1, (20, 0, 32, 16))], [rival]),
    ]
    jobs = [replace(job, view=view) for job, _ in pairs]
    answers = [replace(answer, masks=answer.masks.repeat(3, 1).repeat(2, 2)) for _, answer in pairs]
    first, _ = compete(jobs, answers, settings=CompetitionSettings(1.0, 0.5))
    denied = np.log(1 - chances(rival, view.size))
    lowered = denied.reshape(8, 3, 16, 2).mean(axis=(1, 3))
    assert first.logits is not None
    np.testing.assert_allclose(first.logits[0], own + lowered, atol=0.03)
