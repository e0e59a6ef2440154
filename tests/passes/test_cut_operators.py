"""Zero weights and no weights compute the same behind single operators."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparc.analysis.dependency import Group
from sparc.capture import capture
from sparc.passes.grow.widen import widen
from sparc.verify import relative_error
from tests.passes.cutting import check_every_group


class Model(nn.Module):
    """A function of a tensor and of layers by name."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def check(function: Callable[[Any, Tensor], Tensor], x: Tensor, **layers: nn.Module) -> list[Group]:
    """Cut every group that can be; returns those that are the same as zero weights."""
    torch.manual_seed(0)
    return check_every_group(capture(Model(function, **layers).eval(), (x,)), [x])


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (slice(-16, None), slice(0, 8)),
        (slice(None, -8), slice(-8, None)),
        (slice(-20, -4), slice(16, 24)),
        (slice(0, 16), slice(-40, 8)),
        (slice(-23, None, 2), slice(-24, 24)),
        (slice(None, -1, 2), slice(None, None, 2)),
    ],
)
def test_slices_counted_from_either_end(first: slice, second: slice) -> None:
    sizes = [len(range(24)[each]) for each in (first, second)]
    layers = {"a": nn.Linear(6, 24), "b": nn.Linear(sizes[0], 4), "c": nn.Linear(sizes[1], 4)}

    def function(m: Any, x: Tensor) -> Tensor:
        hidden = torch.relu(m.a(x))
        return m.b(hidden[:, first]) + m.c(hidden[:, second])

    assert check(function, torch.randn(3, 6), **layers)


@pytest.mark.parametrize("every", [slice(0, 24), slice(-24, None), slice(0, None)])
def test_what_grows_is_read_to_its_new_end(every: slice) -> None:
    x = torch.randn(3, 6)
    program = capture(Model(lambda m, x: m.b(m.a(x)[:, every]), a=nn.Linear(6, 24), b=nn.Linear(24, 4)), (x,))
    assert relative_error(program.run(x), widen(program, "a", 48).run(x)) < 1e-5
