"""Fused attention against the official module, which builds all scores."""

from collections.abc import Callable

import pytest
import torch
from segment_anything.modeling.image_encoder import Attention
from torch import Tensor, nn

from refinetool.backends.sam import import_hq_sam
from refinetool.modules import fused_attention
from refinetool.modules.fused_attention import FusedAttention

TOLERANCE = 1e-5


def official(side: int, *, heads: int = 2, channels: int = 8, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    made = Attention(heads * channels, num_heads=heads, use_rel_pos=True, input_size=(side, side))
    for table in (made.rel_pos_h, made.rel_pos_w):
        nn.init.normal_(table)
    return made


def difference(ours: Callable[[Tensor], Tensor], theirs: Callable[[Tensor], Tensor], x: Tensor) -> float:
    with torch.no_grad():
        return float((ours(x) - theirs(x)).abs().max())


@pytest.mark.parametrize("side", [1, 2, 7, 14, 20])
@pytest.mark.parametrize("scores_at_once", [1 << 20, 1, 100, 1000], ids=["bias", "rows-1", "rows-100", "rows-1000"])
def test_it_is_the_official_attention(side: int, scores_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_attention, "SCORES_AT_ONCE", scores_at_once)
    theirs = official(side)
    x = torch.randn(3, side, side, 16)
    assert difference(FusedAttention(theirs), theirs, x) < TOLERANCE


@pytest.mark.parametrize("side", [2, 7, 14])
def test_the_way_of_a_gpu_is_the_official_attention(side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, in place of the way with a bias."""
    theirs = official(side)
    x = torch.randn(2, side, side, 16)

    def extended(query: Tensor, key: Tensor, value: Tensor, **_: object) -> Tensor:
        monkeypatch.undo()
        down = fused_attention.positions(query, theirs.rel_pos_h, side=side, axis=0)
        across = fused_attention.positions(query, theirs.rel_pos_w, side=side, axis=1)
        return fused_attention._extended(query, key, value, down, across)

    monkeypatch.setattr(fused_attention.F, "scaled_dot_product_attention", extended)
    assert difference(FusedAttention(theirs), theirs, x) < TOLERANCE


def test_attention_without_relative_positions_stays() -> None:
    from segment_anything.modeling import ImageEncoderViT

    encoder = ImageEncoderViT(img_size=32, embed_dim=16, depth=1, num_heads=2, out_chans=8)
    fused_attention.fuse_attention(encoder)
    assert isinstance(encoder.blocks[0].attn, Attention)


@pytest.mark.parametrize("kind", ["sam", "sam-hq"])
def test_encoders_with_windows_and_global_blocks(kind: str) -> None:
    from segment_anything import modeling

    encoder_class = (modeling if kind == "sam" else import_hq_sam().modeling).ImageEncoderViT
    torch.manual_seed(1)
    encoder = encoder_class(
        img_size=160,
        embed_dim=32,
        depth=2,
        num_heads=2,
        out_chans=16,
        window_size=4,  # of 10 cells: the last windows are padded
        use_rel_pos=True,
        global_attn_indexes=(1,),
    ).eval()
    for name, parameter in encoder.named_parameters():
        if "rel_pos" in name:
            nn.init.normal_(parameter)
    images = torch.randn(2, 3, 160, 160)
    names = list(encoder.state_dict())
    with torch.no_grad():
        before = encoder(images)
        fused_attention.fuse_attention(encoder)
        after = encoder(images)
    assert list(encoder.state_dict()) == names
    if kind == "sam-hq":
        before, after = before[0], after[0]
    torch.testing.assert_close(after, before, rtol=0, atol=TOLERANCE)
