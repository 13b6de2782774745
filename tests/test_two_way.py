"""The decoder with less work, against the official modules of three packages."""

import copy
import importlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from refinetool.backends.sam import import_hq_sam
from refinetool.modules.two_way import TwoWay, masks_of_cells

SIDE, CHANNELS, ROWS, TOKENS = 6, 32, 3, 5


def official(package: str) -> nn.Module:
    torch.manual_seed(0)
    where = {"sam": "segment_anything.modeling", "sam2": "sam2.modeling.sam.transformer"}
    modeling: Any = import_hq_sam().modeling if package == "sam-hq" else importlib.import_module(where[package])
    made: nn.Module = modeling.TwoWayTransformer(depth=2, embedding_dim=CHANNELS, num_heads=4, mlp_dim=64)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.3)
    return made.eval()


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = ((ROWS, CHANNELS, SIDE, SIDE), (1, CHANNELS, SIDE, SIDE), (ROWS, TOKENS, CHANNELS))
    cells, positions, tokens = (torch.randn(shape, generator=generator) for shape in shapes)
    return cells, positions, tokens


@pytest.mark.parametrize("package", ["sam", "sam-hq", "sam2"])
def test_it_is_the_official_transformer(package: str) -> None:
    theirs = official(package)
    cells, positions, tokens = inputs()
    names = list(theirs.state_dict())
    ours = TwoWay(theirs, positions)
    with torch.no_grad():
        expected = theirs(cells, positions.repeat(ROWS, 1, 1, 1), tokens)
        found = ours(cells, None, tokens)
    assert list(ours.state_dict()) == names
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_masks_are_those_of_the_official_decoder() -> None:
    from segment_anything.modeling import MaskDecoder

    decoder = MaskDecoder(transformer_dim=CHANNELS, transformer=official("sam")).eval()
    cells, positions, prompts = inputs()
    with torch.no_grad():
        expected, _ = decoder.predict_masks(torch.zeros_like(cells[:1]), positions, prompts, cells)
        own = torch.cat((decoder.iou_token.weight, decoder.mask_tokens.weight)).expand(ROWS, -1, -1)
        tokens, mixed = copy.deepcopy(decoder.transformer)(
            cells, positions.repeat(ROWS, 1, 1, 1), torch.cat((own, prompts), 1)
        )
        hypernets = [mlp(tokens[:, 1 + n]) for n, mlp in enumerate(decoder.output_hypernetworks_mlps)]
        found = masks_of_cells(decoder, mixed, torch.stack(hypernets, 1))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
