"""Counting what models cost."""

import json

import pytest
import torch
from commands import Command

from refinetool.backends.costs import _counted, costs_of
from refinetool.errors import UsageError


def test_operations_and_memory_of_a_product_are_counted() -> None:
    a, b = torch.zeros(30, 40), torch.zeros(40, 50)

    def product() -> torch.Tensor:
        for _ in range(3):
            c = a @ b
            del c  # never more than one at a time
        return a @ b

    result, flops, most = _counted(product)
    assert result.shape == (30, 50)
    assert flops == 4 * 2 * 30 * 40 * 50
    assert most == 4 * 30 * 50


def test_the_embedded_models_heads_cost_what_they_are() -> None:
    none, detail, refiner = (costs_of("embedded", head=head, checkpoint=None) for head in ("none", "auto", "detail"))
    assert (none.mask_side, detail.mask_side) == (64, 128)
    assert detail == refiner
    assert none.parameters == detail.parameters
    assert (none.head_parameters, detail.head_parameters > 1e6) == (0, True)
    assert none.image_flops < detail.image_flops
    assert none.mask_flops < detail.mask_flops
    assert none.kept_bytes < detail.kept_bytes < detail.image_bytes * 2


def test_localization_augment_encodes_five_images() -> None:
    none, refiner = (costs_of("embedded", head=head, checkpoint="random:0") for head in ("none", "sam2refiner"))
    assert 5 < refiner.image_flops / none.image_flops < 6
    assert refiner.mask_side == refiner.side == 256


@pytest.mark.slow
def test_the_costs_of_the_large_model_are_those_of_the_specification() -> None:
    """Encoder 1,821 G, five of them with LA's 29 G; PR 3.7 G and MR 66 G, part of which is once per image."""
    none, refiner = (costs_of("sam2.1-hiera-l", head=head, checkpoint=None) for head in ("none", "sam2refiner"))
    assert none.image_flops / 1e9 == pytest.approx(1821, rel=0.005)
    assert none.parameters / 1e6 == pytest.approx(224, rel=0.01)
    assert refiner.head_parameters / 1e6 == pytest.approx(4.7, abs=0.05)
    low_level = 2 * 1024**2 * 9 * (3 * 16 + 16 * 16) / 1e9
    extra = (refiner.image_flops - 5 * none.image_flops) / 1e9
    fine_maps = 2 * 256 * (32 * 256**2 + 64 * 128**2) / 1e9  # not computed of the quarters
    assert extra == pytest.approx(29 + low_level - 4 * fine_maps, abs=1)
    assert (refiner.mask_flops - none.mask_flops) / 1e9 + low_level == pytest.approx(66 + 3.7, rel=0.02)


def test_info_is_printed(command: Command) -> None:
    said = command("models", "info", "embedded")
    assert said.code == 0
    assert "head: detail" in said.out
    assert "GFLOP" in said.out
    told = json.loads(command("models", "info", "embedded", "--head", "none", "--json").out)
    assert told["mask_side"] == 64
    assert told["head"] == "none"


def test_a_head_that_can_not_be_is_refused() -> None:
    with pytest.raises(UsageError, match="can't have a head"):
        costs_of("sam-vit-b", head="detail", checkpoint=None)
