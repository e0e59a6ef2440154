"""Zero weights and no weights compute the same behind single operators."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparc.analysis.dependency import Group, groups
from sparc.capture import capture
from sparc.passes.grow.widen import widen
from sparc.verify import relative_error
from tests.passes.cutting import check_every_group
from tests.passes.models import Called


def check(function: Callable[[Any, Tensor], Tensor], x: Tensor, **layers: nn.Module) -> list[Group]:
    """Cut every group that can be; returns those that are the same as zero weights."""
    torch.manual_seed(0)
    return check_every_group(capture(Called(function, **layers).eval(), (x,)), [x])


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
    program = capture(Called(lambda m, x: m.b(m.a(x)[:, every]), a=nn.Linear(6, 24), b=nn.Linear(24, 4)), (x,))
    assert relative_error(program.run(x), widen(program, "a", 48).run(x)) < 1e-5


@pytest.mark.parametrize(
    ("function", "layers", "size"),
    [
        (lambda m, x: torch.relu(m.over(m.a(x).transpose(1, 2))).sum(1), {"over": nn.Linear(6, 5)}, 12),
        (lambda m, x: m.over(m.a(x).permute(2, 1, 0)).sum(0), {"over": nn.Conv1d(6, 5, 1)}, 12),
        (lambda m, x: m.over(m.a(x).transpose(1, 2)).sum(1), {"over": nn.LayerNorm(6)}, 12),
        (lambda m, x: attended(m, m.a(x).repeat_interleave(2, -1)), {"out": nn.Linear(24, 4)}, 2),
        (lambda m, x: attended(m, m.a(x).repeat(1, 1, 2)), {"out": nn.Linear(24, 4)}, 2),
        (lambda m, x: torch.cat([m.a(x), m.b(x).exp()], -1).sum(-1), {"b": nn.Linear(8, 4)}, 4),
    ],
)
def test_what_is_no_zero_at_zero_weights_is_told(function: Any, layers: dict[str, Any], size: int) -> None:
    """One factor of an axis may be zero where another is not, and a bias makes more than zeros of zeros."""
    torch.manual_seed(0)
    for layer in layers.values():
        nn.init.normal_(layer.bias)
    program = capture(Called(function, a=nn.Linear(8, 12), **layers).eval(), (torch.randn(2, 6, 8),))
    (told,) = (group for group in groups(program) if "summed over" in group.statistic)
    assert told.units == size
    assert not told.frozen


def attended(m: Any, x: Tensor) -> Tensor:
    return m.out(nn.functional.scaled_dot_product_attention(x, x, x))


@pytest.mark.parametrize(
    ("function", "layers"),
    [
        (lambda m, x: m.over(m.a(x).transpose(1, 2)).sum(1), {"over": nn.Linear(6, 5, bias=False)}),
        (lambda m, x: scores(*m.a(x).chunk(2, -1)), {}),
        (lambda m, x: scores(*m.a(x).split([12, 12], -1)), {}),
        (lambda m, x: scores(torch.tanh(m.a(x)), m.b(x).sigmoid()), {"b": nn.Linear(8, 24)}),
        (lambda m, x: scores(torch.cat([m.a(x), m.b(x)], -1), torch.cat([m.b(x), m.a(x).exp()], -1)),
         {"b": nn.Linear(8, 24)}),
    ],
)  # fmt: skip
def test_what_is_zero_at_zero_weights_is_free(function: Any, layers: dict[str, nn.Module]) -> None:
    free = check(function, torch.randn(2, 6, 8), a=nn.Linear(8, 24), **layers)
    assert any(member.weight == "a.weight" and member.axis == 0 for group in free for member in group.members)


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(1, 2)


@pytest.mark.parametrize(
    ("between", "width"),
    [
        (lambda x: nn.functional.adaptive_max_pool2d(x, 2), 12),
        (lambda x: nn.functional.interpolate(x, scale_factor=2, mode="nearest-exact"), 12),
        (lambda x: nn.functional.interpolate(x.flatten(2), scale_factor=2, mode="linear").unflatten(2, (8, 4)), 12),
        (lambda x: nn.functional.interpolate(x.unsqueeze(2), scale_factor=2, mode="trilinear").flatten(2, 3), 12),
        (lambda x: nn.functional.pixel_unshuffle(x, 2), 48),
        (lambda x: nn.functional.pixel_shuffle(x, 2), 3),
        (lambda x: nn.functional.channel_shuffle(x, 3), 12),
    ],
)
def test_operators_on_images_are_seen_through(between: Any, width: int) -> None:
    layers = {"a": nn.Conv2d(3, 12, 1), "b": nn.Conv2d(width, 5, 1)}
    free = check(lambda m, x: m.b(between(torch.relu(m.a(x)))), torch.randn(2, 3, 4, 4), **layers)
    assert any(member.weight == "a.weight" and member.axis == 0 for group in free for member in group.members)
