"""Training computes in bf16 only where that is fast."""

import pytest
import torch

from refinetool.train import kernels
from refinetool.train.kernels import cpu_has_bf16, mixed_precision

CPU = torch.device("cpu")


@pytest.mark.parametrize(("has_bf16", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_a_processor_without_bf16_trains_in_float32(
    has_bf16: bool, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "cpu_has_bf16", lambda: has_bf16)
    ones = torch.ones(2, 2)
    with mixed_precision(CPU):
        assert (ones @ ones).dtype == expected


def test_without_mkldnn_there_is_no_fast_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not cpu_has_bf16()
