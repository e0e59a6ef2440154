"""Blocks that are trained as several branches, built from their published structure, with statistics that matter."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional


def trained(norm: nn.Module) -> nn.Module:
    """A batch norm with random statistics, gain and bias."""
    with torch.no_grad():
        norm.running_mean.normal_()  # type: ignore[operator, union-attr]
        norm.running_var.uniform_(0.5, 2)  # type: ignore[operator, union-attr]
        norm.weight.normal_()  # type: ignore[operator, union-attr]
        norm.bias.normal_()  # type: ignore[operator, union-attr]
    return norm


def conv_norm(inputs: int, outputs: int, kernel: int | tuple[int, int], **given: object) -> nn.Sequential:
    """A convolution without bias, and its batch norm."""
    conv = nn.Conv2d(inputs, outputs, kernel, bias=False, **given)  # type: ignore[arg-type]
    return nn.Sequential(conv, trained(nn.BatchNorm2d(outputs)))


class RepVGG(nn.Module):
    """relu(norm(conv3x3 x) + norm(conv1x1 x) + norm(x)); the last only where shapes allow it (Ding et al., 2021)."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.dense = conv_norm(inputs, outputs, 3, stride=stride, padding=1, groups=groups)
        self.pointwise = conv_norm(inputs, outputs, 1, stride=stride, groups=groups)
        self.identity = trained(nn.BatchNorm2d(inputs)) if inputs == outputs and stride == 1 else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.dense(x) + self.pointwise(x)
        return torch.relu(y if self.identity is None else y + self.identity(x))


class MobileOne(nn.Module):
    """Several convolutions, a 1x1 convolution and a norm of one value (Vasu et al., 2023)."""

    def __init__(self, channels: int, branches: int = 4, groups: int = 1, kernel: int = 3) -> None:
        super().__init__()
        given = {"padding": kernel // 2, "groups": groups}
        self.branches = nn.ModuleList([conv_norm(channels, channels, kernel, **given) for _ in range(branches)])
        self.scale = conv_norm(channels, channels, 1, groups=groups)
        self.skip = trained(nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        out = self.scale(x) + self.skip(x)
        for branch in self.branches:
            out = out + branch(x)
        return torch.relu(out)


class AsymmetricBlock(nn.Module):
    """Square, vertical and horizontal convolutions added (ACNet, Ding et al., 2019)."""

    def __init__(self, channels: int, kernel: int = 3, stride: int = 1) -> None:
        super().__init__()
        p = kernel // 2
        self.square = conv_norm(channels, channels, kernel, padding=p, stride=stride)
        self.vertical = conv_norm(channels, channels, (kernel, 1), padding=(p, 0), stride=stride)
        self.horizontal = conv_norm(channels, channels, (1, kernel), padding=(0, p), stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.square(x) + self.vertical(x) + self.horizontal(x))


class NormAndPad(nn.Module):
    """A batch norm whose result is padded with what it gives for zero."""

    def __init__(self, channels: int, pad: int) -> None:
        super().__init__()
        self.norm, self.pad = trained(nn.BatchNorm2d(channels)), pad

    def forward(self, x: Tensor) -> Tensor:
        out, norm, pad = self.norm(x), self.norm, self.pad
        values = norm.bias.detach() - norm.running_mean * norm.weight.detach() / torch.sqrt(norm.running_var + norm.eps)
        out = functional.pad(out, [pad] * 4)
        values = values.view(1, -1, 1, 1)
        out[:, :, 0:pad, :] = values
        out[:, :, -pad:, :] = values
        out[:, :, :, 0:pad] = values
        out[:, :, :, -pad:] = values
        return out


class IdentityConv(nn.Module):
    """A 1x1 convolution whose kernel is added to the identity."""

    def __init__(self, channels: int, groups: int = 1) -> None:
        super().__init__()
        self.conv, self.groups = nn.Conv2d(channels, channels, 1, groups=groups, bias=False), groups
        nn.init.normal_(self.conv.weight, std=0.1)
        each = channels // groups
        identity = torch.zeros(channels, each, 1, 1)
        identity[torch.arange(channels), torch.arange(channels) % each] = 1.0
        self.register_buffer("identity", identity)

    def forward(self, x: Tensor) -> Tensor:
        return functional.conv2d(x, self.conv.weight + self.identity, groups=self.groups)


class DiverseBranch(nn.Module):
    """k x k, 1x1, 1x1 then k x k, 1x1 then average pooling, each normalised (Ding et al., 2021)."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        p = kernel // 2
        self.origin = conv_norm(inputs, outputs, kernel, stride=stride, padding=p, groups=groups)
        self.pointwise = conv_norm(inputs, outputs, 1, stride=stride, groups=groups)
        self.average = nn.Sequential(
            nn.Conv2d(inputs, outputs, 1, groups=groups, bias=False),
            NormAndPad(outputs, p),
            nn.AvgPool2d(kernel, stride),
            trained(nn.BatchNorm2d(outputs)),
        )
        self.deep = nn.Sequential(
            IdentityConv(inputs, groups),
            NormAndPad(inputs, p),
            nn.Conv2d(inputs, outputs, kernel, stride, groups=groups, bias=False),
            trained(nn.BatchNorm2d(outputs)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.origin(x) + self.pointwise(x) + self.average(x) + self.deep(x))


class Orepa(nn.Module):
    """Online re-parameterization: scaled branches that are squeezed to one kernel in every step (Hu et al., 2022)."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3) -> None:
        super().__init__()
        self.kernel = kernel

        def make(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape) * 0.3)

        self.origin, self.pointwise = make(outputs, inputs, kernel, kernel), make(outputs, inputs, 1, 1)
        self.average, self.prior = make(outputs, inputs, 1, 1), make(outputs, inputs, 1, 1)
        self.first, self.second = make(inputs, inputs, 1, 1), make(outputs, inputs, kernel, kernel)
        self.depthwise, self.separable = make(inputs * 8, 1, kernel, kernel), make(outputs, inputs * 8, 1, 1)
        self.scales = make(6, outputs)
        self.register_buffer("identity", torch.eye(inputs).reshape(inputs, inputs, 1, 1))
        self.register_buffer("mean", torch.full((kernel, kernel), 1 / kernel**2))
        position = math.pi * (torch.arange(kernel) + 0.5) / kernel
        half = [torch.cos(position * (i + 1)) for i in range(outputs // 2)]
        other = [torch.cos(position * (i + 1)) for i in range(outputs - outputs // 2)]
        rows = [wave[:, None].expand(kernel, kernel) for wave in half]
        self.register_buffer("frequency", torch.stack(rows + [wave[None].expand(kernel, kernel) for wave in other]))
        self.norm = trained(nn.BatchNorm2d(outputs))

    def squeezed(self) -> Tensor:
        """The one kernel, `[out, in, k, k]`."""
        padding = self.kernel // 2
        grouped = self.depthwise.reshape(-1, 8, self.kernel, self.kernel)
        mixed = self.separable.reshape(self.separable.shape[0], -1, 8)
        branches = [
            self.origin,
            self.average * self.mean,
            torch.einsum("oimn,ohw->oihw", self.prior, self.frequency),
            torch.einsum("tihw,oths->oihs", self.first + self.identity, self.second)
            if self.kernel == 1
            else torch.einsum("ti,othw->oihw", (self.first + self.identity)[:, :, 0, 0], self.second),
            functional.pad(self.pointwise, [padding] * 4),
            torch.einsum("gthw,ogt->oghw", grouped, mixed),
        ]
        total = torch.zeros_like(self.origin)
        for scale, branch in zip(self.scales, branches, strict=True):
            total = total + scale.reshape(-1, 1, 1, 1) * branch
        return total

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(functional.conv2d(x, self.squeezed(), padding=self.kernel // 2)))
