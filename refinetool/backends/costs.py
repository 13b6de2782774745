"""What a model costs: parameters, operations, and memory, counted without running the encoder.

The encoder is run on fake tensors, which have shapes and no values; the decoder, which is small, on zeros. Operations
are those of matrix products, convolutions and attention; a multiplication with an addition counts as two.
"""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from refinetool.backends.models import DEFAULT_HEAD, HEAD_KINDS, NO_HEAD, find_model, load_backend
from refinetool.backends.names import EMBEDDED
from refinetool.backends.predictions import SquareEmbedding
from refinetool.backends.questions import Question
from refinetool.backends.square import SquareBackend

RANDOM = "random:0"


@dataclass(frozen=True, slots=True)
class Costs:
    """The costs of a model at its input size, in float32.

    parameters: Of the model itself, which heads leave as they are.
    head_parameters: Of its head, 0 without one.
    side: Side of the square input in pixels.
    mask_side: Side of the grid of its masks.
    image_flops, mask_flops: Operations per image or crop, and per mask.
    weight_bytes: Of model and head.
    kept_bytes: What is kept per image until its masks are done.
    image_bytes, mask_bytes: Most memory in use at a time besides the weights, for one image and for one mask.
    """

    name: str
    head: str
    parameters: int
    head_parameters: int
    side: int
    mask_side: int
    image_flops: int
    mask_flops: int
    weight_bytes: int
    kept_bytes: int
    image_bytes: int
    mask_bytes: int


def costs_of(name: str, *, head: str, checkpoint: str | None) -> Costs:
    """Count the costs of a model with a head.

    Args:
        name, head: As for `load_backend`.
        checkpoint: Weights, of which only the architecture counts; a head in a file must belong to them. None asks for
            published weights only with such a head.

    Raises:
        UsageError, WeightsError: As for `load_backend`.
    """
    chosen = find_model(name).head if head == DEFAULT_HEAD else head
    if checkpoint is None and name != EMBEDDED and chosen in (NO_HEAD, *HEAD_KINDS):
        checkpoint = RANDOM
    backend = load_backend(name, checkpoint=checkpoint, device="cpu", precision="fp32", head=head)
    side = 4 * backend.mask_cells
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with torch.inference_mode():
        with fake:
            (encoded,), image_flops, image_bytes = _counted(lambda: backend._encode(torch.zeros(1, 3, side, side)))
        features, extras = encoded
        embedding = SquareEmbedding(
            backend._frame((side, side)), _zeros(features), tuple(_zeros(extra) for extra in extras)
        )
        question = _question(backend, with_sides=chosen != NO_HEAD)
        (logits, _), mask_flops, mask_bytes = _counted(lambda: backend._decode([embedding], question))
    own, on_top = _parts(backend, chosen)
    return Costs(
        name=name,
        head=chosen,
        parameters=own,
        head_parameters=on_top,
        side=side,
        mask_side=logits.shape[-1],
        image_flops=image_flops,
        mask_flops=mask_flops,
        weight_bytes=4 * (own + on_top),
        kept_bytes=sum(tensor.numel() * tensor.element_size() for tensor in (features, *extras)),
        image_bytes=image_bytes,
        mask_bytes=mask_bytes,
    )


def _parts(backend: SquareBackend, head: str) -> tuple[int, int]:
    """Return the number of parameters of the model and of its head."""
    inner = backend.model.detail if hasattr(backend.model, "detail") else None
    own = _count(backend.model) - (0 if inner is None else _count(inner))
    on_top: Any = inner if head == "detail" else getattr(backend, "head", None)
    return own, _count(on_top) if isinstance(on_top, nn.Module) else 0


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _zeros(like: Tensor) -> Tensor:
    return torch.zeros(like.shape, dtype=like.dtype)


def _question(backend: SquareBackend, *, with_sides: bool) -> Question:
    """A box, two points and a mask."""
    cells = backend.mask_cells
    return Question(
        points=(torch.zeros(1, 2, 2), torch.ones(1, 2, dtype=torch.int32)),
        boxes=torch.tensor([[0.0, 0.0, 1.0, 1.0]]),
        masks=torch.zeros(1, 1, cells, cells),
        extras=(torch.zeros(1, 2 * cells, 2 * cells),) if with_sides else (),
    )


def _counted(run: Callable[[], Any]) -> tuple[Any, int, int]:
    """Run something; returns its result, its operations, and the most bytes that it had in use."""
    with FlopCounterMode(display=False) as flops, _Memory() as memory:
        result = run()
    return result, flops.get_total_flops(), memory.most


class _Memory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows the bytes of the tensors that operations make."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.used, self.most = 0, 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Sequence[Any], args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self.known:
            return
        size = storage.nbytes()
        self.known.add(key)
        self.used += size
        self.most = max(self.most, self.used)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.used -= size
