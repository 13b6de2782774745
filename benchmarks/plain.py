"""SAM's refinement written plainly, with the official predictor, as something to be faster than.

One image at a time; distance transforms and Gaussians at full resolution for every mask; all candidates upsampled to
full resolution in two steps, as `SamPredictor` does, and chosen afterwards. All masks of an image share decoder calls.
"""

import cv2
import numpy as np
import torch
from segment_anything import SamPredictor
from torch import Tensor, nn

from refinetool.records import ImageArray, Masks

AMPLITUDE, SPAN = 30.0, 4.0


def refine_plainly(model: nn.Module, image: ImageArray, coarse: Masks, *, passes: int, at_once: int) -> Masks:
    """Refine masks, bool (N, H, W), of one image.

    Args:
        at_once: Masks per decoder call; the candidates of all of them are held at full resolution.
    """
    predictor = SamPredictor(model)
    predictor.set_image(image)
    current = coarse
    for _ in range(passes):
        prompts = [_mine(mask) for mask in current]
        found = []
        for start in range(0, len(prompts), at_once):
            points, boxes, logits = (
                torch.tensor(np.stack(column)).float().to(predictor.device)
                for column in zip(*prompts[start : start + at_once], strict=True)
            )
            place = predictor.transform
            size = (image.shape[0], image.shape[1])
            candidates, scores, _ = predictor.predict_torch(
                point_coords=place.apply_coords_torch(points, size),
                point_labels=torch.tensor([[1, 0]] * len(points), device=predictor.device),
                boxes=place.apply_boxes_torch(boxes, size),
                mask_input=_as_prompt(logits, predictor),
                multimask_output=True,
                return_logits=True,
            )
            best = scores.argmax(1).tolist()
            masks = candidates.cpu().numpy() > 0
            found += [masks[n, k] for n, k in enumerate(best)]
        refined = np.stack(found)
        current = np.where(refined.any(axis=(1, 2), keepdims=True), refined, current)
    return current


def _mine(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the points (2, 2), the box (4,) and the mask prompt (H, W) of one mask."""
    inside = cv2.distanceTransform(mask.astype(np.uint8), cv2.DIST_L2, 5)
    ys, xs = np.nonzero(mask)
    x0, y0, x1, y1 = xs.min(), ys.min(), xs.max() + 1, ys.max() + 1
    in_box = np.zeros_like(mask)
    in_box[y0:y1, x0:x1] = True
    outside = np.where(in_box, cv2.distanceTransform((~mask).astype(np.uint8), cv2.DIST_L2, 5), 0)
    points = [np.unravel_index(field.argmax(), field.shape)[::-1] for field in (inside, outside)]
    deepest = inside.max()
    gauss = AMPLITUDE * np.exp(-(((deepest - inside) / deepest) ** 2) / SPAN)
    return np.array(points), np.array([x0, y0, x1, y1]), np.where(mask, gauss, -AMPLITUDE).astype(np.float32)


def _as_prompt(logits: Tensor, predictor: SamPredictor) -> Tensor:
    """Resize mask prompts (N, H, W) as images are: the longer side to 256, padded to a square."""
    height, width = (side // 4 for side in predictor.input_size)
    small = torch.nn.functional.interpolate(logits[:, None], (height, width), mode="bilinear", antialias=True)
    return torch.nn.functional.pad(small, (0, 256 - width, 0, 256 - height), value=-AMPLITUDE)
