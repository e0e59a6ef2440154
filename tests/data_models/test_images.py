import numpy as np
import pytest
import torch

from examples.models.images import (
    calibration_images,
    centre_crop,
    crops,
    held_out_crops,
    held_out_images,
    to_pixels,
)


def test_held_out_photographs_are_other_photographs():
    def signature(picture):
        return centre_crop(picture).astype(float)[::8, ::8].ravel()

    calibration = np.stack([signature(picture) for picture in calibration_images()])
    held_out = np.stack([signature(picture) for picture in held_out_images()])
    assert len(calibration) >= 12
    assert len(held_out) >= 20
    centred = [x - x.mean(1, keepdims=True) for x in (calibration, held_out)]
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in centred)
    assert (a @ b.T).max() < 0.9


def test_crops_are_seeded_distinct_and_normalised():
    pictures = held_out_images()[:3]
    first, again, other = crops(pictures, 9, seed=1), crops(pictures, 9, seed=1), crops(pictures, 9, seed=2)
    assert first.shape == (9, 3, 224, 224)
    assert first.dtype == torch.float32
    assert torch.equal(first, again)
    assert torch.equal(first[:3], other[:3])
    assert not torch.equal(first[3:], other[3:])
    assert len({tuple(crop.flatten()[::997].tolist()) for crop in first}) == 9
    assert first.min() >= -127 / 128
    assert first.max() <= 1


def test_at_least_four_hundred_held_out_crops_by_default():
    assert len(held_out_crops()) >= 400


def test_centre_crop_keeps_the_middle_and_the_channel_order():
    picture = np.zeros((512, 1024, 3), np.uint8)
    picture[:, 512:, 0] = 255
    pixels = to_pixels([centre_crop(picture)])[0]
    assert pixels[0, 112, 100].item() == pytest.approx(-127 / 128)
    assert pixels[0, 112, 124].item() == pytest.approx(1.0)
    assert pixels[1:].max().item() == pytest.approx(-127 / 128)
