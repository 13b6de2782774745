"""The SAM2Refiner head: its three modules, and what it asks of the model below it."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_backends import small_sam2
from torch import Tensor, nn

from refinetool.modules.detail import DetailHead
from refinetool.modules.embedded import build_embedded
from refinetool.modules.heads import Decoded, Features, Prompted
from refinetool.modules.sam2_passes import decode, encode, see, set_image_size
from refinetool.modules.sam2refiner import (
    AugmentedDetailHead,
    LocalizationAugment,
    MaskRefinement,
    PromptRetargeting,
    ReceptiveFields,
    Sam2RefinerHead,
    assemble,
    prompt_map,
    quarters,
)
from refinetool.settings import RefinerOptions

SIDE = 128


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Small tensors: more threads would only wait for each other."""
    torch.set_num_threads(1)
    torch.manual_seed(0)


def small(kind: str = "sam2") -> Any:
    return (small_sam2() if kind == "sam2" else build_embedded(image_size=SIDE)).eval().requires_grad_(False)


def run(sam: Any, head: Any, images: Tensor) -> tuple[Features, Decoded, Any]:
    """A box, two clicks and a mask for each image."""
    side, count = images.shape[-1], len(images)
    points = torch.tensor([[[0.2, 0.2], [0.8, 0.7], [0.5, 0.5], [0.25, 0.6]]]).repeat(count, 1, 1) * side
    labels = torch.tensor([[2, 3, 1, 0]], dtype=torch.int32).repeat(count, 1)
    masks = torch.full((count, 1, side // 4, side // 4), -10.0)
    masks[..., side // 16 : side // 8, side // 16 : side // 8] = 10
    features = see(sam, images)
    seen = head.look(features, lambda further: encode(sam, further))
    encoder = sam.sam_prompt_encoder
    sparse, dense = encoder(points=(points, labels), boxes=None, masks=masks)
    embedding = features.embedding if seen.embedding is None else seen.embedding
    decoded = decode(sam, embedding, features.fine_maps, sparse=sparse, dense=dense, positions=encoder.get_dense_pe())
    sides = F.interpolate(torch.sign(masks), scale_factor=2)[:, 0]
    return features, decoded, head(seen.maps, Prompted((points, labels), sides), decoded)


# --- sizes


def test_the_parameters_are_those_of_the_specification() -> None:
    """4.7 M, of which LA 0.79, PR 1.89 and MR 2.01, with the 256 channels of the official models."""
    from sam2.modeling.sam.transformer import TwoWayAttentionBlock

    block = TwoWayAttentionBlock(256, 8, mlp_dim=2048)
    parts = (
        LocalizationAugment(256),
        PromptRetargeting(256, block),
        MaskRefinement(256, residual=False, cues=False),
    )
    counts = [sum(parameter.numel() for parameter in part.parameters()) / 1e6 for part in parts]
    assert counts == pytest.approx([0.79, 1.89, 2.01], abs=0.005)


@pytest.mark.parametrize("side", [128, 256, pytest.param(512, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["sam2", "embedded"])
def test_masks_have_the_side_of_the_input(kind: str, side: int) -> None:
    sam = small(kind)
    set_image_size(sam, side)
    head = Sam2RefinerHead(RefinerOptions(), sam)
    with torch.no_grad():
        features, decoded, answer = run(sam, head, torch.randn(1, 3, side, side))
    channels = sam.sam_prompt_encoder.embed_dim
    assert [tuple(level.shape) for level in features.pyramid] == [
        (1, channels, side // n, side // n) for n in (4, 8, 16)
    ]
    assert decoded.cells.shape == (1, channels, side // 16, side // 16)
    assert answer.logits.shape == (1, side, side)
    assert [level.shape[-1] for level in answer.auxiliary] == [side // 16, side // 8, side // 4]


@pytest.mark.slow
def test_an_official_architecture_takes_the_head_at_1024() -> None:
    from refinetool.backends.sam2 import Sam2Backend

    sam = Sam2Backend.network("sam2.1/sam2.1_hiera_t").eval().requires_grad_(False)
    head = Sam2RefinerHead(RefinerOptions(), sam)
    with torch.no_grad():
        _, _, answer = run(sam, head, torch.randn(1, 3, 1024, 1024))
    assert answer.logits.shape == (1, 1024, 1024)


# --- the model below


@pytest.mark.parametrize("kind", ["sam2", "embedded"])
def test_the_decoder_is_the_official_one(kind: str) -> None:
    sam = small(kind)
    head = Sam2RefinerHead(RefinerOptions(la=False), sam)
    images = torch.randn(2, 3, SIDE, SIDE)
    with torch.no_grad():
        features, decoded, _ = run(sam, head, images)
        official = sam.forward_image(images)["backbone_fpn"]
        for ours, theirs in zip((*features.fine_maps, features.pyramid[-1]), official, strict=True):
            assert torch.equal(ours, theirs)
        points = torch.tensor([[[0.2, 0.2], [0.8, 0.7], [0.5, 0.5], [0.25, 0.6]]]).repeat(2, 1, 1) * SIDE
        labels = torch.tensor([[2, 3, 1, 0]], dtype=torch.int32).repeat(2, 1)
        masks = torch.full((2, 1, SIDE // 4, SIDE // 4), -10.0)
        masks[..., SIDE // 16 : SIDE // 8, SIDE // 16 : SIDE // 8] = 10
        sparse, dense = sam.sam_prompt_encoder(points=(points, labels), boxes=None, masks=masks)
        logits, scores, tokens, _ = sam.sam_mask_decoder.predict_masks(
            image_embeddings=features.embedding,
            image_pe=sam.sam_prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            repeat_image=False,
            high_res_features=list(features.fine_maps),
        )
    assert torch.equal(decoded.logits, logits)
    assert torch.equal(decoded.scores, scores)
    first = 2 if sam.sam_mask_decoder.pred_obj_scores else 1
    assert torch.equal(decoded.tokens[:, first : first + 4], tokens)


@pytest.mark.parametrize("kind", ["sam2", "embedded"])
def test_every_parameter_of_the_head_learns_and_none_of_the_model(kind: str) -> None:
    sam = small(kind)
    head = Sam2RefinerHead(RefinerOptions(cues=True), sam)
    for parameter in head.parameters():  # last layers that are zero would hide those before them
        parameter.data.add_(0.02 * torch.randn(parameter.shape))
    _, _, answer = run(sam, head, torch.randn(1, 3, SIDE, SIDE))
    (answer.logits.square().mean() + sum(level.square().mean() for level in answer.auxiliary)).backward()
    without = [
        name
        for name, parameter in head.named_parameters()
        if parameter.grad is None or not parameter.grad.abs().sum() > 0
    ]
    # Keys have no use for a bias: it adds the same to all of a query's scores.
    assert [name for name in without if not name.endswith(("k_proj.bias", "key.bias"))] == []
    assert all(parameter.grad is None for parameter in sam.parameters())


def test_the_detail_head_lets_localization_augment_learn() -> None:
    sam = small()
    channels = sam.sam_prompt_encoder.embed_dim
    detail = DetailHead(fine_channels=(channels // 8, channels // 4), channels=channels)
    head = AugmentedDetailHead(detail, sam)
    for parameter in head.parameters():
        parameter.data.add_(0.05 * torch.randn(parameter.shape))
    _, _, answer = run(sam, head, torch.randn(2, 3, SIDE, SIDE))
    answer.logits.square().mean().backward()
    without = [name for name, one in head.la.named_parameters() if one.grad is None or not one.grad.abs().sum() > 0]
    assert [name for name in without if not name.endswith("key.bias")] == []
    assert all(parameter.grad is None for parameter in sam.parameters())


def test_the_models_parameters_are_not_the_heads() -> None:
    sam = small()
    head = Sam2RefinerHead(RefinerOptions(), sam)
    assert not any(parameter is other for parameter in head.parameters() for other in sam.parameters())
    copied = copy.deepcopy(head)
    assert copied._borrowed.sam is sam
    assert next(copied.parameters()) is not next(head.parameters())


# --- LA


def slow_augment(la: LocalizationAugment, embedding: Tensor, local: Tensor, place: Any) -> Tensor:
    """Query by query, head by head."""
    channels, height, width = embedding.shape[1:]
    tokens, at = [], []
    for cells in (2, 4, 8):
        side = local.shape[-1] // cells
        for y in range(side):
            for x in range(side):
                part = local[0, :, y * cells : (y + 1) * cells, x * cells : (x + 1) * cells]
                tokens.append(part.mean((1, 2)))
                at.append(place((side, side))[:, y, x])
    normed = [la.norm_local(token) for token in tokens]
    result = torch.zeros_like(embedding)
    size = channels // 8
    for y in range(height):
        for x in range(width):
            given = embedding[0, :, y, x]
            query = la.query(la.norm_global(given) + place((height, width))[:, y, x])
            mixed = torch.zeros(channels)
            for n in range(8):
                part = slice(n * size, (n + 1) * size)
                scores = torch.stack(
                    [(query[part] * la.key(token + where)[part]).sum() for token, where in zip(normed, at, strict=True)]
                )
                shares = (scores / size**0.5).softmax(0)
                mixed[part] = sum(share * la.value(token)[part] for share, token in zip(shares, normed, strict=True))
            attended = given + la.leave(mixed)
            hidden = F.gelu(la.hidden(la.norm_hidden(attended)))
            result[0, :, y, x] = attended + la.last(hidden)
    return result


def test_localization_augment_is_the_papers_attention() -> None:
    la = LocalizationAugment(16)
    for parameter in la.parameters():
        parameter.data.add_(0.3 * torch.randn(parameter.shape))
    encoder = small().sam_prompt_encoder
    from sam2.modeling.position_encoding import PositionEmbeddingRandom

    place = PositionEmbeddingRandom(8)
    assert encoder.pe_layer((4, 4)).shape == (encoder.embed_dim, 4, 4)
    embedding, local = torch.randn(1, 16, 4, 4), torch.randn(1, 16, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(
            la(embedding, local, place), slow_augment(la, embedding, local, place), rtol=1e-4, atol=1e-4
        )


def test_localization_augment_begins_as_the_identity() -> None:
    sam = small()
    head = Sam2RefinerHead(RefinerOptions(), sam)
    features = see(sam, torch.randn(1, 3, SIDE, SIDE))
    seen = head.look(features, lambda further: encode(sam, further))
    assert seen.embedding is not None
    assert torch.equal(seen.embedding, features.embedding)


def test_quarters_come_back_to_their_places() -> None:
    corners = torch.zeros(1, 1, 4, 4)
    corners[..., :2, 2:], corners[..., 2:, :2], corners[..., 2:, 2:] = 1, 2, 3
    enlarged = quarters(corners)
    assert [part.unique().tolist() for part in enlarged] == [[0], [1], [2], [3]]
    assert all(part.shape == corners.shape for part in enlarged)
    assert torch.equal(assemble([part[..., ::2, ::2] for part in enlarged]), corners)


# --- PR


def test_clicks_are_discs_of_five_cells_at_1024() -> None:
    logits = torch.linspace(-3, 3, 64 * 64).view(1, 64, 64).repeat(2, 1, 1)
    points = torch.tensor([[[100.0, 40.0], [10.0, 200.0]], [[0.0, 0.0], [50.0, 60.0]]])
    labels = torch.tensor([[1, 0], [-1, 2]])
    drawn = prompt_map((points, labels), logits, side=1024 // 4)
    radius = max(5 * 256 / 1024, 1.0)
    for channel, kind in ((0, 1), (1, 0)):
        for n in range(2):
            expected = torch.zeros(64, 64)
            for (x, y), label in zip(points[n].tolist(), labels[n].tolist(), strict=True):
                for row in range(64):
                    for column in range(64):
                        away = ((column + 0.5 - (x + 0.5) / 4) ** 2 + (row + 0.5 - (y + 0.5) / 4) ** 2) ** 0.5
                        if label == kind and away <= radius:
                            expected[row, column] = 1
            assert torch.equal(drawn[n, channel], expected)
    assert drawn[0, 0].sum() > 1
    assert not drawn[1, :2].any(), "absent points and boxes are not drawn"
    torch.testing.assert_close(drawn[:, 2], logits.sigmoid())
    assert not prompt_map(None, logits, side=256)[:, :2].any()
    large = prompt_map((points[:1] * 4, labels[:1]), torch.zeros(1, 256, 256), side=1024)
    assert 70 <= large[0, 0].sum() <= 90, "a disc of radius 5"


def test_receptive_fields_begin_as_the_identity_and_reach_seven_cells() -> None:
    fields = ReceptiveFields(16)
    cells = torch.randn(1, 16, 16, 16)
    torch.testing.assert_close(fields(cells), cells)
    nn.init.normal_(fields.fuse.weight)
    changed = cells.clone()
    changed[..., 8, 8] += 1
    rows, columns = (fields(changed) - fields(cells))[0].abs().sum(0).nonzero().T
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (5, 11, 5, 11)


def test_retargeting_begins_with_the_decoders_last_block() -> None:
    sam = small()
    head = Sam2RefinerHead(RefinerOptions(), sam)
    assert head.pr is not None
    last = sam.sam_mask_decoder.transformer.layers[-1]
    for ours, theirs in zip(head.pr.block.parameters(), last.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        assert ours.requires_grad


def test_boxes_act_through_tokens_and_clicks_through_the_map_too() -> None:
    sam = small()
    head = Sam2RefinerHead(RefinerOptions(), sam)
    assert head.pr is not None
    _, decoded, _ = run(sam, head, torch.randn(1, 3, SIDE, SIDE))
    positions = sam.sam_prompt_encoder.get_dense_pe()
    logits = decoded.logits[:, 0]
    maps = [
        prompt_map((torch.tensor([[[30.0, 40.0]]]), torch.tensor([[label]])), logits, side=SIDE) for label in (1, 0, 2)
    ]
    cells = [head.pr(drawn, decoded, positions)[1] for drawn in maps]
    empty = head.pr(prompt_map(None, logits, side=SIDE), decoded, positions)[1]
    assert not torch.equal(cells[0], cells[1])
    assert not torch.equal(cells[0], empty)
    assert torch.equal(cells[2], empty)


# --- MR, and parts of the head


def test_an_untrained_residual_head_gives_the_decoders_mask_back() -> None:
    sam = small()
    head = Sam2RefinerHead(RefinerOptions(residual=True, cues=True), sam)
    with torch.no_grad():
        _, decoded, answer = run(sam, head, torch.randn(2, 3, SIDE, SIDE))
    wide = F.interpolate(decoded.logits[:, :1], scale_factor=4, mode="bilinear")[:, 0]
    torch.testing.assert_close(answer.logits, wide)


def test_the_image_itself_reaches_the_mask() -> None:
    """What is only in the finest pixels is seen: the low-level features are at S."""
    refinement = MaskRefinement(64, residual=False, cues=False)
    pyramid = [torch.zeros(1, 64, SIDE // n, SIDE // n) for n in (4, 8, 16)]
    cells, logits = torch.zeros(1, 64, SIDE // 16, SIDE // 16), torch.zeros(1, SIDE // 4, SIDE // 4)
    images = torch.zeros(1, 3, SIDE, SIDE)
    images[..., 64, 64] = 1
    with torch.no_grad():
        plain, spotted = (
            refinement(cells, pyramid, refinement.look(picture), logits, None)[0] for picture in (images * 0, images)
        )
    rows, columns = (plain - spotted)[0].abs().gt(1e-6).nonzero().T
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (61, 67, 61, 67), "three kernels of 3"


@pytest.mark.parametrize(
    ("options", "grid", "parts"),
    [
        (RefinerOptions(pr=False, mr=False), SIDE // 4, {"la"}),
        (RefinerOptions(la=False), SIDE, {"pr", "mr"}),
        (RefinerOptions(pr=False), SIDE, {"la", "mr"}),
        (RefinerOptions(mr=False), SIDE // 4, {"la", "pr"}),
        (RefinerOptions(), SIDE, {"la", "pr", "mr"}),
    ],
)
def test_the_graphs_of_the_ablation(options: RefinerOptions, grid: int, parts: set[str]) -> None:
    sam = small()
    head = Sam2RefinerHead(options, sam)
    _, decoded, answer = run(sam, head, torch.randn(1, 3, SIDE, SIDE))
    assert answer.logits.shape == (1, grid, grid)
    assert {name.partition(".")[0] for name, _ in head.named_parameters()} == parts
    assert head.augments == ("la" in parts)
    if parts == {"la"}:
        assert torch.equal(answer.logits, decoded.logits[:, 0]), "untrained, it is the decoder's mask"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sam2", "embedded"])
def test_a_picture_of_thin_structures_can_be_learnt(kind: str) -> None:
    """IoU above 0.98 on lines that are two pixels wide, which are half a cell of the decoder's grid."""
    sam = small(kind)
    truth = torch.zeros(SIDE, SIDE)
    for n in range(8, SIDE - 8, 12):
        truth[n : n + 2, 8:-8] = 1
        truth[8:-8, n : n + 2] = 1
    colours = torch.stack((truth * 0.8, truth * 0.3, 1 - truth)) + 0.05 * torch.randn(3, SIDE, SIDE)
    head = Sam2RefinerHead(RefinerOptions(), sam)
    optimizer = torch.optim.Adam(head.parameters(), lr=2e-3)
    best = 0.0
    for _ in range(300):
        _, _, answer = run(sam, head, colours[None])
        loss = F.binary_cross_entropy_with_logits(answer.logits[0], truth)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        found = answer.logits[0] > 0
        best = max(best, float((found & (truth > 0)).sum() / (found | (truth > 0)).sum()))
        if best > 0.98:
            break
    assert best > 0.98
