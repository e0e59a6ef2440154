"""Rotary embeddings: every spelling becomes one operator, what only looks like one does not."""

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparc.capture import capture
from sparc.codegen.onnx.check import check_model
from sparc.program import Program
from tests.codegen.emitting import assert_agrees, emit, operators

torch.manual_seed(0)
WHERE = [("cpu", 23), ("portable", 23), ("cuda", 21)]


def halves(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat([-x[..., half:], x[..., :half]], -1)


def pairs(x: Tensor) -> Tensor:
    return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)


def swapped(x: Tensor) -> Tensor:
    """The wrong half negated."""
    half = x.shape[-1] // 2
    return torch.cat([x[..., half:], -x[..., :half]], -1)


def doubled(angles: Tensor) -> Tensor:
    return torch.cat([angles, angles], -1)


def repeated(angles: Tensor) -> Tensor:
    return angles.repeat_interleave(2, -1)


class Turning(nn.Module):
    """Queries and keys turned by their positions, then attention.

    Args:
        rotate: how elements are exchanged.
        spread: how angles are repeated for them.
        width: how many elements of a head's 8 are turned.
        split: whether heads are split off (axis 1) before they are turned, or after (axis 2).
        batched: whether positions differ between rows.
    """

    def __init__(
        self,
        rotate: Callable[[Tensor], Tensor] = halves,
        spread: Callable[[Tensor], Tensor] = doubled,
        width: int = 8,
        split: bool = True,
        batched: bool = False,
    ) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(32, 32), nn.Linear(32, 16)
        self.rotate, self.spread, self.width, self.split, self.batched = rotate, spread, width, split, batched
        self.register_buffer("inverse", 1 / 100 ** (torch.arange(width // 2) / (width // 2)))

    def turned(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        if self.width == x.shape[-1]:
            return x * cos + self.rotate(x) * sin
        head, rest = x[..., : self.width], x[..., self.width :]
        return torch.cat([head * cos + self.rotate(head) * sin, rest], -1)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        positions = torch.arange(length)[None].float()
        if self.batched:
            positions = positions + x[:, :1, 0].round()
        angles = self.spread(positions[..., None] * self.inverse)
        axis = 1 if self.split else 2
        cos, sin = angles.cos().unsqueeze(axis), angles.sin().unsqueeze(axis)
        q, k = (f(x).view(batch, length, -1, 8) for f in (self.q, self.k))
        if self.split:
            q, k = self.turned(q.transpose(1, 2), cos, sin), self.turned(k.transpose(1, 2), cos, sin)
        else:
            q, k = self.turned(q, cos, sin).transpose(1, 2), self.turned(k, cos, sin).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, k, is_causal=True, enable_gqa=True)
        return y.transpose(1, 2).reshape(batch, length, 32)


def captured(model: nn.Module) -> tuple[Program, Tensor]:
    """The program, and an input of it."""
    x = torch.randn(3, 5, 32)
    return capture(model.eval(), (x,), dynamic={"x": {0: "batch", 1: "length"}}), x


@functools.cache
def turning(
    rotate: Callable[[Tensor], Tensor], spread: Callable[[Tensor], Tensor], width: int, split: bool
) -> tuple[Program, Tensor]:
    """The program of `Turning`, captured once for all targets."""
    return captured(Turning(rotate, spread, width, split))


def found(case: nn.Module | tuple[Program, Tensor], flavour: str = "cpu", opset: int = 23) -> list[str]:
    """The operators; the emission is valid and equal on two shapes."""
    program, x = captured(case) if isinstance(case, nn.Module) else case
    emission = emit(program.clone(), flavour, opset=opset)
    check_model(emission.models["forward"])
    assert_agrees(program, emission, [x])
    assert_agrees(program, emission, [x[:2, :3].contiguous()])
    return operators(emission)


@pytest.mark.parametrize(("rotate", "spread"), [(halves, doubled), (pairs, repeated)])
@pytest.mark.parametrize("width", [8, 4])
@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize(("flavour", "opset"), WHERE)
def test_one_operator_each(
    rotate: Callable[[Tensor], Tensor],
    spread: Callable[[Tensor], Tensor],
    width: int,
    split: bool,
    flavour: str,
    opset: int,
) -> None:
    ops = found(turning(rotate, spread, width, split), flavour, opset)
    assert ops.count("RotaryEmbedding") == 2
    assert "Neg" not in ops


def test_no_head_is_moved_between_projection_and_attention() -> None:
    ops = found(Turning())
    assert ops.count("Attention") == 1
    assert not {"Transpose", "Reshape"} & set(ops)


def test_positions_that_differ_between_rows() -> None:
    assert found(Turning(batched=True)).count("RotaryEmbedding") == 2
    assert "RotaryEmbedding" not in found(Turning(batched=True), "cuda", 21)


def test_older_opsets_spell_it_out() -> None:
    assert "RotaryEmbedding" not in found(Turning(), "cpu", 21)


@pytest.mark.parametrize(
    ("rotate", "spread"),
    [(swapped, doubled), (halves, repeated), (pairs, doubled), (halves, lambda a: torch.cat([a, 2 * a], -1))],
)
def test_what_only_looks_like_it(rotate: Callable[[Tensor], Tensor], spread: Callable[[Tensor], Tensor]) -> None:
    assert "RotaryEmbedding" not in found(Turning(rotate, spread))
