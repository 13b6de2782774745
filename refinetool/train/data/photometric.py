"""Photometric augmentation: changes colour, sharpness, noise and compression of B images on the training device."""

import math

import torch
from torch import Tensor

from refinetool.train.data.crops import blurred
from refinetool.train.data.draws import Draws

NOISE_BANK = 1 << 20
BLOCK = 8


def photometric(images: Tensor, draws: Draws, *, bank: Tensor) -> Tensor:
    """Change brightness, contrast, channel gains, saturation, sharpness, noise and compression at random.

    Args:
        images: float32 (B, 3, S, S), 0..255.
        draws: On the CPU, one row per image.
        bank: Normal numbers, float32 (NOISE_BANK,), from `noise_bank`; every image uses a piece of it.

    Returns:
        float32 (B, 3, S, S), whole numbers 0..255.
    """
    device = images.device

    def drawn(name: str, low: float, high: float, *shape: int) -> Tensor:
        return draws.between(name, low, high, *(shape or (1,))).to(device)[:, :, None, None]

    pixels = (images - 128) * drawn("contrast", 0.65, 1.35) + 128 + drawn("brightness", -25, 25)
    pixels = pixels * drawn("gains", 0.88, 1.12, 3)
    grey = pixels.mean(1, keepdim=True)
    saturation = torch.where(drawn("grey", 0, 1) < 0.1, drawn("saturation", 0, 1.5), drawn("saturation", 0.5, 1.5))
    pixels = grey + (pixels - grey) * saturation

    for name, probability, change in (("blur", 0.2, _blur), ("noise", 0.3, _noise), ("compress", 0.2, _compress)):
        on_host = (draws.uniform(name) < probability).nonzero()[:, 0]
        if len(on_host):
            rows = on_host.to(device)
            pixels[rows] = change(pixels[rows].clamp(0, 255), draws.take(on_host), bank)
    return pixels.round().clamp(0, 255)


def noise_bank(device: str | torch.device) -> Tensor:
    """Return normal numbers, the same in every run: float32 (NOISE_BANK,)."""
    return torch.randn(NOISE_BANK, generator=torch.Generator().manual_seed(0)).to(device)


def _blur(pixels: Tensor, draws: Draws, _bank: Tensor) -> Tensor:
    return blurred(pixels, draws.between("sigma", 0.4, 1.5).to(pixels.device))


def _noise(pixels: Tensor, draws: Draws, bank: Tensor) -> Tensor:
    count = math.prod(pixels.shape[1:])
    start = draws.below("start", torch.tensor(NOISE_BANK)).to(pixels.device)
    place = (start[:, None] + torch.arange(count, device=pixels.device)) % NOISE_BANK
    strength = draws.between("strength", 1, 8).to(pixels.device)
    return pixels + bank[place].view(pixels.shape) * strength[:, None, None, None]


def _compress(pixels: Tensor, draws: Draws, _bank: Tensor) -> Tensor:
    """Imitate JPEG: quantise the cosine coefficients of 8 x 8 blocks, high frequencies more coarsely.

    Luminance and two colour differences are treated alike, except that the steps of the colours are twice as wide.
    """
    device = pixels.device
    place = torch.arange(BLOCK, device=device)
    basis = torch.cos(math.pi / BLOCK * (place + 0.5) * place[:, None]) * math.sqrt(2 / BLOCK)
    basis[0] /= math.sqrt(2)
    to_differences = torch.tensor([[0.299, 0.587, 0.114], [-0.169, -0.331, 0.5], [0.5, -0.419, -0.081]], device=device)
    finest = 4 + 8 * (place[:, None] + place)
    steps = finest * torch.tensor((1.0, 2.0, 2.0), device=device)[:, None, None]
    steps = steps * draws.between("coarseness", 0.2, 1.5).to(device)[:, None, None, None]
    blocks = torch.einsum("dc,bcyx->bdyx", to_differences, pixels - 128)
    blocks = blocks.unfold(2, BLOCK, BLOCK).unfold(3, BLOCK, BLOCK)  # (B, 3, rows, columns, 8, 8)
    coefficients = basis @ blocks @ basis.T
    wide = steps[:, :, None, None]
    blocks = basis.T @ ((coefficients / wide).round() * wide) @ basis
    planes = blocks.permute(0, 1, 2, 4, 3, 5).reshape(pixels.shape)
    return torch.einsum("cd,bdyx->bcyx", torch.linalg.inv(to_differences), planes) + 128
