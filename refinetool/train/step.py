"""One step of training: losses, gradients, and the moving average of the weights."""

import copy
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from refinetool.settings import TrainSettings
from refinetool.train.data.examples import Example
from refinetool.train.kernels import fast_attention
from refinetool.train.ranks import Ranks

RANK_SEED = 1 << 32
"""Distance of the seeds of processes that train together."""


class Loss(NamedTuple):
    """The loss of a batch, and the mean IoU of the masks for full prompts, for reporting. Both are on the device."""

    total: Tensor
    iou: Tensor


class Trained(Protocol):
    """What is trained.

    module: Everything that learns.
    product: The part of it that is averaged, measured and saved in the end.
    """

    @property
    def module(self) -> nn.Module: ...

    @property
    def product(self) -> nn.Module: ...

    def loss(self, batch: Example, *, host: torch.Generator, noise: torch.Generator) -> Loss:
        """Compute the loss of a batch.

        Args:
            host, noise: The step's generators on the CPU and on the device.
        """


class Learner:
    """What is trained, with its optimiser and the moving average of its product."""

    def __init__(self, trained: Trained, *, settings: TrainSettings, ranks: Ranks) -> None:
        self.trained, self.settings, self.ranks = trained, settings, ranks
        self.average = copy.deepcopy(trained.product).eval()
        self.optimizer = build_optimizer(trained.module, settings=settings)

    def step(self, batch: Example, *, step: int, learning_rate: float) -> Loss:
        """Train one step on a batch; the loss stays on the device, so that the next step need not wait for it."""
        settings, device = self.settings, batch.image.device
        seed = settings.seed * 1_000_003 + step
        # Kinds of prompts are the same in all processes, so that none waits for another.
        host = torch.Generator().manual_seed(seed)
        noise = torch.Generator(device).manual_seed(seed + RANK_SEED * self.ranks.rank)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        with fast_attention(device):
            loss = self.trained.loss(batch, host=host, noise=noise)
        self.optimizer.zero_grad(set_to_none=True)
        loss.total.backward()  # type: ignore[no-untyped-call]
        learning = [p for p in self.trained.module.parameters() if p.grad is not None]
        self.ranks.average([p.grad for p in learning if p.grad is not None])
        nn.utils.clip_grad_norm_(learning, 1.0)
        self.optimizer.step()
        decay = min(settings.average_decay, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(_floats(self.average), _floats(self.trained.product), 1 - decay)
        return Loss(loss.total.detach(), loss.iou)


def _floats(module: nn.Module) -> list[Tensor]:
    """Return the averaged tensors: parameters, and the running statistics of batch normalisation."""
    return [tensor for tensor in module.state_dict().values() if tensor.is_floating_point()]


def build_optimizer(module: nn.Module, *, settings: TrainSettings) -> torch.optim.Optimizer:
    """Build AdamW without weight decay on vectors, embeddings and tokens; frozen parameters are left out."""
    plain: list[Tensor] = []
    decayed: list[Tensor] = []
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        exempt = parameter.ndim < 2 or "embed" in name or "token" in name
        (plain if exempt else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, settings.second_beta), fused=True)
