"""Photographs shipped with the repository: some for calibration, others held out. See data/images/LICENCES.md."""

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
