"""Operators on a sequence whose first places are constant: divided, and joined again, they give the same."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparc.capture import capture
from sparc.pass_base import PassContext
from sparc.passes.canonicalize import Canonicalize
from sparc.passes.fold.sequence import Sequence

COUNT, WIDTH = 3, 8


class Prompted(nn.Module):
    """A function of a prompt and what follows."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.prompt, self.vector = nn.Parameter(torch.randn(COUNT, WIDTH)), nn.Parameter(torch.randn(WIDTH))
        self.layer, self.norm = nn.Linear(WIDTH, 6), nn.LayerNorm(WIDTH)
        self.table, self.places = nn.Embedding(32, WIDTH), nn.Parameter(torch.randn(32, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, torch.cat([self.prompt.expand(x.shape[0], -1, -1), x], 1))


def _positions(x: Tensor, start: int = 0) -> Tensor:
    return torch.arange(start, start + x.shape[1])


DIVIDED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "linear": lambda m, x: m.layer(x),
    "norm": lambda m, x: m.norm(x),
    "pointwise": lambda m, x: torch.sigmoid(x * m.vector) + x,
    "softmax of features": lambda m, x: x.softmax(-1),
    "sum of features": lambda m, x: x.sum(-1) * 2.0,
    "mean, axis kept": lambda m, x: x.mean(-1, keepdim=True) * x,
    "heads": lambda m, x: x.reshape(x.shape[0], x.shape[1], 2, 4).permute(2, 0, 3, 1).sin(),
    "heads and back": lambda m, x: x.reshape(x.shape[0], x.shape[1], 2, 4).transpose(1, 2).transpose(1, 2).flatten(2),
    "unflattened": lambda m, x: x.unflatten(-1, (2, 4)).tanh(),
    "halves": lambda m, x: torch.cat([-x[..., 4:], x[..., :4]], -1),
    "pieces": lambda m, x: x.chunk(2, -1)[0] * x.split([4, 4], -1)[1],
    "every second feature": lambda m, x: torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2),
    "counted positions": lambda m, x: x + m.table(torch.ones(x.shape[:2], dtype=torch.long).cumsum(1) + 1),
    "one feature": lambda m, x: x[..., 2].exp(),
    "new axes": lambda m, x: x[:, None].expand(-1, 3, -1, -1) + 1.0,
    "repeated heads": lambda m, x: x[:, None].repeat_interleave(2, 1) * 2.0,
    "embedded positions": lambda m, x: x + m.table(_positions(x))[None],
    "positions that start later": lambda m, x: x + m.table(_positions(x, 2)),
    "a table of positions": lambda m, x: x + m.places[: x.shape[1]],
    "rotary positions": lambda m, x: x * (_positions(x)[:, None].float() * m.vector).cos(),
    "another cast": lambda m, x: x.double().abs().float(),
}
WHOLE: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "sum of places": lambda m, x: x.sum(1),
    "sums along the sequence": lambda m, x: x.cumsum(1),
    "softmax of places": lambda m, x: x.softmax(1),
    "product of places": lambda m, x: x @ x.transpose(1, 2),
    "places in features": lambda m, x: x.flatten(1),
    "against the batch": lambda m, x: x * x.mean(0, keepdim=True),
    "turned over": lambda m, x: x.flip(1),
    "moved by one": lambda m, x: x + x.roll(1, 1),
}


def _divided(function: Callable[[Any, Tensor], Tensor], *, fixed: bool = False) -> tuple[Any, Any, Sequence, Any]:
    torch.manual_seed(0)
    x = torch.randn(2, 5, WIDTH)
    program = capture(Prompted(function).eval(), (x,), dynamic=None if fixed else {"x": {0: "batch", 1: "length"}})
    Canonicalize().run(program, PassContext())
    other = program.clone()
    cat = next(node for node in other.graph.nodes if node.target is torch.ops.aten.cat.default)
    sequence = Sequence(other, other.main, COUNT, cat.meta["val"].shape[1])
    sequence.divide()
    return program, other, sequence, other.main.output.args[0][0]


@pytest.mark.parametrize("name", DIVIDED)
def test_divided_and_joined(name: str) -> None:
    program, other, sequence, result = _divided(DIVIDED[name])
    assert result in sequence.parts
    assert sequence.parts[result].front.meta["val"].shape[sequence.parts[result].axis] == COUNT
    sequence.join()
    sequence.connect()
    other.sweep()
    assert other.text() != program.text()
    x = torch.randn(4, 7, WIDTH)
    torch.testing.assert_close(other.run(x), program.run(x))


@pytest.mark.parametrize("name", WHOLE)
def test_what_mixes_places_is_not_divided(name: str) -> None:
    _, _, sequence, result = _divided(WHOLE[name])
    assert result not in sequence.parts
    assert sequence.stopped is not None


@pytest.mark.parametrize("name", ["sum of places", "sums along the sequence", "softmax of places"])
def test_what_mixes_places_of_fixed_sizes_is_not_divided(name: str) -> None:
    _, _, sequence, result = _divided(WHOLE[name], fixed=True)
    assert result not in sequence.parts
