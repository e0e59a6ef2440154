"""What is done to rows of an embedding is done to its table."""

import pytest
import torch
from torch import Tensor, nn

from sparc.capture import capture
from sparc.driver import Driver
from sparc.encoding.int_grid import IntGrid
from sparc.ledger import PassRow
from sparc.pass_base import Pass, Samples
from sparc.passes.canonicalize import Canonicalize
from sparc.passes.encode import Encode
from sparc.passes.fold import fold_table
from sparc.passes.round import Round
from sparc.program import Program
from sparc.testing import assert_mutants_caught, assert_pass

IDS = torch.randint(0, 20, (2, 6))


class Rows(nn.Module):
    """An embedding, and a function of its rows."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.table, self.other = nn.Embedding(20, 16), nn.Embedding(2, 16)
        self.low, self.up = nn.Embedding(20, 4), nn.Linear(4, 16, bias=False)
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 20, bias=False)
        nn.init.normal_(self.norm.weight)
        nn.init.normal_(self.norm.bias)
        self.wide, self.places = nn.Linear(16, 128), nn.Parameter(torch.randn(6, 16))
        self.register_buffer("kinds", torch.ones(1, 8, dtype=torch.long))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        if self.kind == "norm":
            x = self.norm(x) * 4.0
        elif self.kind == "low rank":
            x = x + self.up(self.low(ids)) * 0.5
        elif self.kind == "constant index":
            x = x + self.other(self.kinds[:, : ids.shape[1]].expand(ids.shape[0], -1))
        elif self.kind == "tied":
            return self.head_of(x * 2.0)
        elif self.kind == "wide":
            x = self.wide(x)
        elif self.kind == "places":
            x = x + self.places
        elif self.kind == "other index":
            x = x + self.other(ids % 2)
        elif self.kind == "tapped":
            return torch.softmax(x, 1) + self.norm(x)
        return torch.cumsum(x, 1)

    def head_of(self, x: Tensor) -> Tensor:
        return nn.functional.linear(torch.cumsum(x, 1), self.table.weight)


def folded(kind: str, *first: Pass) -> tuple[Program, PassRow]:
    torch.manual_seed(0)
    driver = Driver(capture(Rows(kind).eval(), (IDS,)), Samples({"forward": [[IDS]]}), verify="full")
    for step in (Canonicalize(), *first):
        driver.run(step)
    row = driver.run(fold_table)
    return driver.program, row


def operators(program: Program) -> list[str]:
    return [node.target._opname for node in program.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("kind", ["norm", "low rank", "constant index"])
def test_the_table_takes_it_in(kind: str) -> None:
    program, row = folded(kind)
    assert operators(program) == ["embedding", "cumsum"]
    assert set(program.weights) == {"table.weight"}
    assert row.measured["region, float64"] < 1e-12


def test_merged_tables_keep_their_origins() -> None:
    program, _ = folded("low rank")
    assert set(program.weights.record("table.weight").origins) == {"table.weight", "low.weight"}


@pytest.mark.parametrize(
    ("kind", "why"),
    [("tied", "used elsewhere"), ("wide", "would be larger"), ("encoded", "encoded already")],
)
def test_reasons_to_leave_it_alone(kind: str, why: str) -> None:
    first = (Round(IntGrid(8)), Encode()) if kind == "encoded" else ()
    _, row = folded("norm" if kind == "encoded" else kind, *first)
    assert row.changed == 0
    assert why in row.skips[0].why


@pytest.mark.parametrize("kind", ["places", "other index", "tapped"])
def test_what_is_no_function_of_one_row_is_something_else(kind: str) -> None:
    _, row = folded(kind)
    assert row.changed == 0
    assert not row.skips


def test_a_constant_index_is_proved_for_every_length() -> None:
    dynamic = {"ids": {0: "batch", 1: "length"}}
    torch.manual_seed(0)
    model = Rows("constant index").eval()
    assert_pass(fold_table, model, {"ids": torch.randint(0, 20, (2, 3))}, dynamic=dynamic)


def test_wrong_twins_are_caught() -> None:
    torch.manual_seed(0)
    assert "ScaledConstant" in assert_mutants_caught(fold_table, Rows("low rank").eval(), (IDS,))
