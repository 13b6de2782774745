"""Refines masks in NumPy arrays.

python examples/refine_arrays.py
"""

import numpy as np
from skimage import data

import refinetool


def main() -> None:
    image = data.coffee()  # uint8 (H, W, 3), RGB
    rows, columns = np.mgrid[: image.shape[0], : image.shape[1]]
    cup = ((columns - 340) / 190) ** 2 + ((rows - 190) / 150) ** 2 < 1  # a rough ellipse around the cup

    refiner = refinetool.load("embedded")
    (refined,) = refiner.refine_image(image, cup[None])

    print(f"{refined.status}: {cup.sum()} pixels before, {refined.mask.sum()} after")
    print(f"the model expects an IoU of {refined.predicted_iou:.2f}")


if __name__ == "__main__":
    main()
