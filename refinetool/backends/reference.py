"""Loads a reference encoder with its image encoder, and uses the two: annotated references become tokens.

A file of weights names what the encoder was trained with: the image encoder, the decoder (a model of
`refinetool models list`, and its weights), the kinds of annotations, and the classes that it never saw.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.resources import files
from pathlib import Path

import torch
from torch import Tensor

from refinetool.backends.image_encoders import Features, ImageEncoder, find_image_encoder, load_image_encoder
from refinetool.backends.models import is_random, misfit, read_state, seeded
from refinetool.backends.names import EMBEDDED
from refinetool.backends.square import SquareBackend
from refinetool.backends.weights import user_path
from refinetool.errors import UsageError, WeightsError
from refinetool.modules.described_files import read_description
from refinetool.modules.reference_encoder import AnnotationResize, ReferenceEncoder, on_grid, pseudo_mask
from refinetool.records import ImageArray, Mask
from refinetool.settings import ReferenceSettings

METADATA = "refinetool_reference_encoder"


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a reference encoder was trained with.

    decoder, decoder_fingerprint: The model that its tokens are for, and the hash of its weights without its head.
    threshold: Probability above which pixels belong to the class; chosen on validation episodes.
    kinds: The kinds of annotations it was trained on.
    held_out: Names of the classes that were kept out of training.
    trained: Further facts for people, such as the data and the number of steps.
    """

    image_encoder: str
    image_encoder_fingerprint: str
    decoder: str
    decoder_fingerprint: str
    mid_channels: int
    width: int
    queries: int
    heads: int
    normalise: bool
    resize: AnnotationResize
    threshold: float = 0.5
    kinds: tuple[str, ...] = ()
    held_out: tuple[str, ...] = ()
    trained: Mapping[str, object] = field(default_factory=dict)

    def build(self) -> ReferenceEncoder:
        """Build an encoder of these sizes, with random weights."""
        return ReferenceEncoder(
            mid_channels=self.mid_channels, width=self.width, queries=self.queries, heads=self.heads
        )


@dataclass(frozen=True, slots=True, eq=False)
class Shot:
    """One annotated reference: features, annotation (1, 1, h, w), high-level features under it (1, D, h, w)."""

    features: Features
    annotation: Tensor
    annotated: Tensor


class Prompter:
    """Turns annotated references and a target into tokens. Stateless between calls.

    fingerprint: Hash of all weights and settings that tokens depend on.
    """

    def __init__(self, model: ReferenceEncoder, encoder: ImageEncoder, recipe: Recipe, *, device: torch.device) -> None:
        self.model = model.to(device).eval().requires_grad_(False)
        self.encoder, self.recipe, self.device = encoder, recipe, device
        digest = hashlib.sha256(json.dumps(asdict(replace(recipe, trained={})), sort_keys=True).encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(name.encode() + tensor.cpu().numpy().tobytes())
        self.fingerprint = digest.hexdigest()

    def look(self, image: ImageArray) -> Features:
        """Compute the features of an image, uint8 (H, W, 3) RGB: a batch of one."""
        with torch.inference_mode():
            features: Features = self.encoder(self.encoder.pixels(image)[None])
        return features

    def shot(self, image: ImageArray, annotation: Mask) -> Shot:
        """Prepare a reference: an image, and the pixels that are annotated in it, bool (H, W)."""
        return self.shot_of(self.look(image), annotation)

    def shot_of(self, features: Features, annotation: Mask) -> Shot:
        """Do the same for an image whose features are known."""
        given = torch.from_numpy(annotation.copy()).to(self.device).float()[None]
        with torch.inference_mode():
            grid = on_grid(given, features.grid, resize=self.recipe.resize)
            return Shot(features, grid, self.encoder.annotated(features, grid))

    def tokens(self, target: Features, shots: Sequence[Shot]) -> Tensor:
        """Compute the prompt of a class with several references: float32 (1, shots x N, C)."""
        with torch.inference_mode():
            # One at a time, so that the rounding of a shot's tokens does not depend on the other shots.
            each = [
                self.model(shot.features.mid, shot.annotation, target.mid, self.pseudo(target, shot)) for shot in shots
            ]
            return torch.cat(each, dim=1)

    @staticmethod
    def joined(tokens: Sequence[Tensor]) -> Tensor:
        """Join prompts (1, T, C) with the same number of tokens: (K, T, C)."""
        return torch.cat(list(tokens))

    def pseudo(self, target: Features, shot: Shot) -> Tensor:
        """Compute the pseudo mask of a target for one reference: float32 (1, 1, h, w)."""
        with torch.inference_mode():
            return pseudo_mask(target.high, shot.annotated, normalise=self.recipe.normalise)


# --- files


def shipped_reference_weights() -> Path:
    """Return the path of the weights in the package, for the image encoder and the model `embedded`."""
    return Path(str(files("refinetool").joinpath("assets", "reference-embedded.safetensors")))


def read_reference_encoder(path: Path) -> tuple[ReferenceEncoder, Recipe]:
    """Read weights with their recipe.

    Raises:
        WeightsError: The file is not one that `train reference` wrote.
    """
    wanted = "name a file that refinetool train reference wrote"
    content = read_description(path, entry=METADATA, what="a reference encoder", writer="refinetool train reference")
    try:
        lists = {name: tuple(content[name]) for name in ("kinds", "held_out")}
        recipe = Recipe(**{**content, **lists})
        model = recipe.build()
    except KeyError as error:
        raise WeightsError(
            f"{path}: this is not a reference encoder: its description lacks {error}; {wanted}"
        ) from error
    except (ValueError, TypeError, RuntimeError, AssertionError) as error:
        raise WeightsError(f"{path}: can't be read as a reference encoder ({error}); {wanted}") from error
    state = read_state(path)
    problem = misfit(expected=model.state_dict(), found=state)
    if problem:
        raise WeightsError(f"{path}: does not fit its own description: {problem}; {wanted}")
    model.load_state_dict(state)
    return model, recipe


def load_prompter(
    weights: str | None,
    *,
    image_encoder: str | None,
    encoder_checkpoint: str | None,
    backend: SquareBackend,
    settings: ReferenceSettings,
) -> Prompter:
    """Load a reference encoder and its image encoder for a model.

    Args:
        weights: A file that `train reference` wrote; `random:SEED`; None for the weights in the package.
        image_encoder: A name in `IMAGE_ENCODERS`; None for the one that the weights name, or `embedded`.
        encoder_checkpoint: Weights of the image encoder; see `load_image_encoder`.
        backend: The model that decodes.
        settings: Sizes of random weights.

    Raises:
        UsageError: There is no such image encoder, or it is not the one of the weights.
        WeightsError: The weights can't be read, or are for another model or other weights of it.
    """
    if image_encoder is not None:
        find_image_encoder(image_encoder)
    device = str(backend.device)
    if is_random(weights):
        encoder = load_image_encoder(image_encoder or EMBEDDED, checkpoint=encoder_checkpoint, device=device)
        recipe = recipe_for(encoder, backend, settings=settings)
        return Prompter(seeded(weights, recipe.build), encoder, recipe, device=backend.device)
    if weights is None and backend.name != EMBEDDED:
        raise WeightsError(
            f"there are no reference encoder's weights for {backend.name} in the package: train some with refinetool "
            f"train reference --model {backend.name}, and name the file with --reference-encoder"
        )
    path = shipped_reference_weights() if weights is None else user_path(weights)
    model, recipe = read_reference_encoder(path)
    if image_encoder is not None and image_encoder != recipe.image_encoder:
        raise UsageError(
            f"{path}: was trained with the image encoder {recipe.image_encoder}, not {image_encoder}; leave out "
            "--encoder"
        )
    if recipe.decoder != backend.name:
        raise WeightsError(
            f"{path}: was trained for the decoder of {recipe.decoder}, and its tokens mean nothing to {backend.name}; "
            f"use --model {recipe.decoder}"
        )
    encoder = load_image_encoder(recipe.image_encoder, checkpoint=encoder_checkpoint, device=device)
    for what, found, expected in (
        (f"the model {backend.name}", backend.base_fingerprint, recipe.decoder_fingerprint),
        (f"the image encoder {recipe.image_encoder}", encoder.fingerprint, recipe.image_encoder_fingerprint),
    ):
        if found != expected:
            raise WeightsError(f"{path}: was trained with other weights of {what}; train it again for these")
    return Prompter(model, encoder, recipe, device=backend.device)


def recipe_for(encoder: ImageEncoder, backend: SquareBackend, *, settings: ReferenceSettings) -> Recipe:
    """Return the recipe of an encoder between these two, which has not been trained."""
    return Recipe(
        encoder.name,
        encoder.fingerprint,
        backend.name,
        backend.base_fingerprint,
        encoder.mid_channels,
        backend.token_width,
        settings.queries,
        settings.heads,
        settings.normalise,
        settings.resize,
    )
