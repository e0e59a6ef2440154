"""How constant units are found: NaN stands for all that depends on the input."""

from typing import Any

import pytest
import torch

from sparc.passes.coalesce.constants import _FUNCTIONS


@pytest.mark.parametrize("name", sorted(_FUNCTIONS - {"cat", "chunk", "split", "split_with_sizes", "slice", "dropout"}))
def test_functions_keep_what_is_not_known(name: str) -> None:
    """Constants are found by letting NaN stand for what depends on the input: no function may lose it."""
    unknown = torch.full((2, 16, 4, 4), torch.nan, dtype=torch.float64)
    arguments = {
        **dict.fromkeys(["add", "sub", "div"], (torch.ones(1, dtype=torch.float64),)),
        **dict.fromkeys(["reshape", "view"], ([-1],)),
        **dict.fromkeys(["max_pool2d", "adaptive_avg_pool2d"], ([2, 2],)),
        "permute": ([0, 1, 3, 2],),
        "transpose": (0, 1),
        **dict.fromkeys(["unsqueeze", "squeeze"], (0,)),
    }
    value = unknown[0] if name in ("max_pool1d", "adaptive_avg_pool1d") else unknown
    given_: tuple[Any, ...] = ([2],) if name.endswith("pool1d") else arguments.get(name, ())
    assert bool(getattr(torch.ops.aten, name)(value, *given_).isnan().all())
