"""Every exact pass on a graph that a reader can follow: its equation, the program before, the program after."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from examples.models.reparameterized import NormAndPad, RepVGG, trained
from sparc.capture import capture
from sparc.driver import Driver
from sparc.pass_base import Pass, Samples
from sparc.passes.canonicalize import Canonicalize
from sparc.passes.canonicalize.padding import raise_padding
from sparc.passes.clean import RemoveNoOps
from sparc.passes.coalesce import coalesce_parallel
from sparc.passes.fold import (
    FoldPrompt,
    fold_affine,
    fold_batch_norm,
    fold_batch_norm_before,
    fold_shared,
    fold_table,
)
from tests.passes.models import Called
from tests.passes.prompted import Decoder

IMAGE = torch.zeros(1, 4, 6, 6)


def _adapted(m: Any, x: Tensor) -> Tensor:
    return m.base(x) + 2.0 * m.up(m.down(x))


def _shared(m: Any, x: Tensor) -> Tensor:
    return m.layer(x) + m.layer(torch.tanh(x))


def _row(m: Any, ids: Tensor) -> Tensor:
    return torch.cumsum(m.norm(m.table(ids)) * 4.0, 1)


def _gated(m: Any, x: Tensor) -> Tensor:
    return m.down(nn.functional.silu(m.gate(x)) * m.up(x))


def linear(inputs: int, outputs: int, *, bias: bool = False) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=bias)


CASES: dict[str, tuple[Pass, tuple[Pass, ...], nn.Module, Tensor]] = {
    "fold_batch_norm": (fold_batch_norm, (), nn.Sequential(nn.Conv2d(4, 8, 3), trained(8)), IMAGE),
    "fold_batch_norm_before": (fold_batch_norm_before, (), nn.Sequential(trained(4), nn.Conv2d(4, 8, 3)), IMAGE),
    "fold_affine": (fold_affine, (), RepVGG(4, 4), IMAGE),
    "fold_affine_adapter": (
        fold_affine,
        (),
        Called(_adapted, base=linear(16, 12, bias=True), down=linear(16, 2), up=linear(2, 12)),
        torch.zeros(3, 16),
    ),
    "raise_padding": (
        raise_padding,
        (RemoveNoOps(),),
        nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), NormAndPad(4, 1), nn.Conv2d(4, 8, 3)),
        IMAGE,
    ),
    "fold_shared": (fold_shared, (), Called(_shared, layer=linear(8, 6, bias=True)), torch.zeros(2, 8)),
    "fold_table": (
        fold_table,
        (),
        Called(_row, table=nn.Embedding(20, 8), norm=nn.LayerNorm(8)),
        torch.zeros(2, 5, dtype=torch.long),
    ),
    "fold_prompt": (FoldPrompt(limit=1.0), (), Decoder(), torch.zeros(2, 5, dtype=torch.long)),
    "coalesce_parallel": (
        coalesce_parallel,
        (),
        Called(_gated, gate=linear(8, 12), up=linear(8, 12), down=linear(12, 8)),
        torch.zeros(2, 8),
    ),
}

DYNAMIC = {"fold_prompt": {"ids": {0: "batch", 1: "length"}}}


@pytest.mark.parametrize("case", CASES)
def test_a_pass_by_example(case: str, golden: Callable[[str, str], None]) -> None:
    step, first, model, x = CASES[case]
    driver = Driver(capture(model.eval(), (x,), dynamic=DYNAMIC.get(case)), Samples({"forward": [[x]]}))
    for each in first or (Canonicalize(),):
        driver.run(each)
    before = driver.program.text()
    assert driver.run(step).matches == 1
    equation = " ".join((type(step).__doc__ or "").split("\n\n")[0].split())
    golden(f"exact/{case}.txt", f"{equation}\n\n{before}\nbecomes\n\n{driver.program.text()}")
