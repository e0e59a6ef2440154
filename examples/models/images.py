"""Photographs shipped with the repository: some for calibration, others held out. See data/images/LICENCES.md."""

import math
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

Picture = NDArray[np.uint8]

_FOLDER = Path(__file__).parent / "data" / "images"
_SIZE = 224
_RESIZED = 256  # the short side before a centre crop of 224, as ImageNet classifiers are evaluated
_SMALLEST_AREA = 0.4  # of the photograph; smaller crops rarely show a whole object
_MEAN, _SCALE = 127.0, 128.0  # the network's own normalisation of pixels 0..255


def calibration_images() -> list[Picture]:
    """Return the 26 calibration photographs, uint8 [height, width, 3], ordered by file name."""
    return _load("calibration")


def held_out_images() -> list[Picture]:
    """Return the 43 held-out photographs, uint8 [height, width, 3], ordered by file name; none is used to calibrate."""
    return _load("held_out")


def held_out_names() -> list[str]:
    """Return the held-out photographs' names (such as ``animal_bison``) in the order of `held_out_images`."""
    return [path.stem for path in _paths("held_out")]


def calibration_crops(count: int = 104, seed: int = 0) -> Tensor:
    """Return `count` crops of the calibration photographs (see `crops`)."""
    return crops(calibration_images(), count, seed)


def held_out_crops(count: int = 430, seed: int = 0) -> Tensor:
    """Return `count` crops of the held-out photographs (see `crops`): ten of each by default."""
    return crops(held_out_images(), count, seed)


def crops(pictures: Sequence[Picture], count: int, seed: int) -> Tensor:
    """Cut crops from photographs in turn: first the centre crop of each, then seeded random ones.

    A random crop covers 40 to 100% of the photograph, at an aspect ratio between 3:4 and 4:3; half are mirrored.

    Returns:
        float32 [count, 3, 224, 224], normalised as the network expects; crop `i` shows picture ``i % len(pictures)``.
    """
    generator = random.Random(seed)
    cut = []
    for index in range(count):
        picture = pictures[index % len(pictures)]
        cut.append(centre_crop(picture) if index < len(pictures) else _random_crop(picture, generator))
    return to_pixels(cut)


def centre_crop(picture: Picture) -> Picture:
    """Resize the shorter side to 256 (bicubic) and cut the central 224 x 224."""
    image = Image.fromarray(picture)
    scale = _RESIZED / min(image.size)
    width, height = (round(side * scale) for side in image.size)
    left, top = (width - _SIZE) // 2, (height - _SIZE) // 2
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(resized.crop((left, top, left + _SIZE, top + _SIZE)))


def to_pixels(pictures: Sequence[Picture]) -> Tensor:
    """Normalise uint8 [224, 224, 3] pictures to float32 [batch, 3, 224, 224]: (value - 127) / 128."""
    stacked = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float()
    return ((stacked - _MEAN) / _SCALE).contiguous()


def _load(part: str) -> list[Picture]:
    return [np.asarray(Image.open(path).convert("RGB")) for path in _paths(part)]


def _paths(part: str) -> list[Path]:
    return sorted((_FOLDER / part).glob("*.jpg"))


def _random_crop(picture: Picture, generator: random.Random) -> Picture:
    height, width = picture.shape[:2]
    area = height * width * generator.uniform(_SMALLEST_AREA, 1.0)
    aspect = math.exp(generator.uniform(math.log(3 / 4), math.log(4 / 3)))
    crop_width = min(width, round(math.sqrt(area * aspect)))
    crop_height = min(height, round(math.sqrt(area / aspect)))
    left = generator.randint(0, width - crop_width)
    top = generator.randint(0, height - crop_height)
    box = (left, top, left + crop_width, top + crop_height)
    image = Image.fromarray(picture).resize((_SIZE, _SIZE), Image.Resampling.BICUBIC, box=box)
    if generator.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(image)
