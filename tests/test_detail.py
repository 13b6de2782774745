"""The detail head and the cues it is given."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from refinetool.modules.cues import BINS, RARE, colour_cue, place_cue
from refinetool.modules.detail import DetailHead
from refinetool.modules.heads import Decoded, Features, Prompted

SIDE = 32


def head(seed: int = 0) -> DetailHead:
    torch.manual_seed(seed)
    return DetailHead(fine_channels=(4, 8), channels=16).eval()


def shaken(seed: int) -> DetailHead:
    """A head whose every weight matters, as after training."""
    made = head(seed)
    with torch.no_grad():
        for name, tensor in made.state_dict().items():
            if tensor.is_floating_point() and not name.endswith("running_var"):
                tensor.add_(0.03 * torch.randn(tensor.shape))
    return made


def inputs(count: int, generator: torch.Generator) -> tuple[list[Tensor], Tensor, Tensor]:
    colours = torch.rand(count, 3, SIDE, SIDE, generator=generator)
    maps = [
        torch.randn(count, channels, SIDE // stride, SIDE // stride, generator=generator)
        for channels, stride in ((4, 4), (8, 8), (16, 16))
    ]
    coarse = torch.sign(torch.randn(count, SIDE // 2, SIDE // 2, generator=generator))
    logits = torch.randn(count, SIDE // 4, SIDE // 4, generator=generator)
    return [colours, *maps], coarse, logits


def ask(made: DetailHead, given: tuple[list[Tensor], Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    (images, *fine, embedding), coarse, logits = given
    none = torch.zeros(len(logits), 0, 0)
    decoded = Decoded(logits[:, None], none, none, none, none, ())
    with torch.no_grad():
        maps = made.look(Features(images, (), embedding, fine)).maps
        answer = made(maps, Prompted(None, coarse), decoded)
    assert answer.scores is not None
    return answer.logits, answer.scores


def test_an_untrained_head_gives_the_decoders_mask_back() -> None:
    given = inputs(2, torch.Generator().manual_seed(1))
    refined, score = ask(head(), given)
    wide = torch.nn.functional.interpolate(given[2][:, None], scale_factor=2.0, mode="bilinear")[:, 0]
    torch.testing.assert_close(refined, wide)
    assert ((score > 0) & (score < 1)).all()


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000))
def test_a_batch_is_its_singles(seed: int) -> None:
    made = shaken(seed)
    maps, coarse, logits = inputs(3, torch.Generator().manual_seed(seed))
    together = ask(made, (maps, coarse, logits))
    for n in range(3):
        rows = slice(n, n + 1)
        alone = ask(made, ([m[rows] for m in maps], coarse[rows], logits[rows]))
        for one, all_of_them in zip(alone, together, strict=True):
            torch.testing.assert_close(one, all_of_them[rows], rtol=1e-3, atol=1e-3)


def test_the_head_sees_the_coarse_mask_and_its_absence() -> None:
    made = shaken(3)
    maps, coarse, logits = inputs(1, torch.Generator().manual_seed(3))
    answers = [ask(made, (maps, given, logits))[0] for given in (coarse, -coarse, torch.zeros_like(coarse))]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert (answers[one] - answers[other]).abs().max() > 1e-3


def slow_cue(coordinates: Tensor, inside: Tensor, *, balanced: bool) -> Tensor:
    """One mask, pixel by pixel: counts in a volume, blurred and read with NumPy loops."""
    counts = np.zeros((2, BINS, BINS, BINS))
    height, width = inside.shape
    for y in range(height):
        for x in range(width):
            cell = tuple(int(min(c.item() * BINS, BINS - 1)) for c in coordinates[:, y, x])
            counts[(0 if inside[y, x] else 1, *cell)] += 1
    for axis in (1, 2, 3):
        padded = np.pad(counts, [(1, 1) if a == axis else (0, 0) for a in range(4)])
        counts = sum(
            weight * np.take(padded, range(start, start + BINS), axis) for start, weight in enumerate((0.25, 0.5, 0.25))
        )
    if balanced:
        counts = counts / (counts.sum((1, 2, 3), keepdims=True) + 1) * 1000
    contrast = (counts[0] - counts[1]) / (counts[0] + counts[1] + RARE)
    result = torch.zeros(height, width)
    for y in range(height):
        for x in range(width):
            at = [min(max(c.item() * BINS - 0.5, 0), BINS - 1) for c in coordinates[:, y, x]]
            low = [min(int(a), BINS - 2) for a in at]
            for corner in np.ndindex(2, 2, 2):
                weight = np.prod([a - i if c else 1 - (a - i) for a, i, c in zip(at, low, corner, strict=True)])
                result[y, x] += weight * contrast[tuple(i + c for i, c in zip(low, corner, strict=True))]
    return result


def test_cues_are_those_of_a_slow_histogram() -> None:
    generator = torch.Generator().manual_seed(0)
    colours = torch.rand(2, 3, 9, 11, generator=generator)
    coarse = torch.sign(torch.randn(2, 9, 11, generator=generator))
    y = ((torch.arange(9) + 0.5) / 9)[:, None].expand(9, 11)
    x = ((torch.arange(11) + 0.5) / 11).expand(9, 11)
    for n in range(2):
        luminance = (colours[n] * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0)
        found = [cue(colours, torch.stack((-coarse, coarse), 1))[n, 1] for cue in (colour_cue, place_cue)]
        torch.testing.assert_close(found[0], slow_cue(colours[n], coarse[n] > 0, balanced=True), rtol=1e-4, atol=1e-4)
        near = slow_cue(torch.stack((y, x, luminance)), coarse[n] > 0, balanced=False)
        torch.testing.assert_close(found[1], near, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cue", [colour_cue, place_cue])
def test_a_piece_of_another_colour_is_told(cue: Callable[[Tensor, Tensor], Tensor]) -> None:
    colours = torch.full((1, 3, 32, 32), 0.1)
    colours[:, :, 8:24, 8:24] = 0.9
    coarse = torch.where(colours[:, 0] > 0.5, 1.0, -1.0)
    coarse[:, 12:15, 12:15] = -1  # a hole in the object
    coarse[:, 0:3, 16:19] = 1  # an island beside it
    found = cue(colours, coarse[:, None])[0, 0]
    assert (found[12:15, 12:15] > 0.2).all()
    assert (found[0:3, 16:19] < 0).all()


def test_cues_of_masks_without_a_side() -> None:
    colours = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    for value in (1.0, -1.0):
        found = colour_cue(colours, torch.full((1, 1, 8, 8), value))
        assert (found * value > 0.5).all()
