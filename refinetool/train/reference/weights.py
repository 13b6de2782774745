"""Writes the weights of a reference encoder."""

import json
from dataclasses import asdict
from pathlib import Path

from safetensors.torch import save

from refinetool.backends.reference import METADATA, Recipe
from refinetool.formats.storage import new_file
from refinetool.modules.reference_encoder import ReferenceEncoder


def write_reference_encoder(model: ReferenceEncoder, recipe: Recipe, path: Path) -> None:
    """Write weights as float16 with their recipe in the file's metadata; `read_reference_encoder` reads them."""
    tensors = {name: tensor.detach().half().cpu().contiguous() for name, tensor in model.state_dict().items()}
    with new_file(path) as file:
        file.write(save(tensors, metadata={METADATA: json.dumps(asdict(recipe))}))
