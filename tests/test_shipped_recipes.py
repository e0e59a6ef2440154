"""Shipped recipes as users call them, on tiny models and without data."""

import pytest
import torch
from torch import Tensor, nn

import sparc
from sparc.encoding.int_grid import IntGrid
from sparc.passes.recipes import INT4, INT8
from sparc.verify import relative_error


class Language(nn.Module):
    """Tokens to logits, with a head tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(96, 64)
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(12))
        self.narrow = nn.Linear(64, 8, bias=False)
        self.wide = nn.Linear(8, 64, bias=False)
        self.head = nn.Linear(64, 96, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        for layer in self.layers:
            x = x + torch.relu(layer(x))
        return self.head(self.wide(self.narrow(x)))


def test_w4_spends_a_budget_without_data() -> None:
    ids = torch.arange(24).reshape(2, 12)
    artifact = sparc.compile(Language(), {"ids": ids}, recipe="w4", measure=False)
    rows = {row.weight: row for row in artifact.ledger.sites}
    assert rows["table.weight"].encoding == str(INT8)
    linear = [row for row in artifact.ledger.sites if row.weight != "table.weight"]
    assert {row.encoding for row in linear} == {str(INT4), str(INT8)}
    assert rows["narrow.weight"].encoding == str(INT8), "all that is heard goes through it"
    assert sum(row.file_bytes for row in linear) <= 0.17 * sum(row.dense_bytes for row in linear)


@pytest.mark.parametrize("recipe", ["w8", "w4"])
def test_a_tied_head_is_in_memory_once(recipe: str) -> None:
    ids = torch.arange(24).reshape(2, 12)
    model = Language()
    artifact = sparc.compile(model, {"ids": ids}, recipe=recipe, measure=False)
    (tied,) = (row for row in artifact.ledger.sites if row.weight == "table.weight")
    assert tied.kernel == "Gather + MatMulIntegerToFloat"
    assert tied.activation == "IntGrid(bits=8, group='tensor')+IntGrid(bits=8, group='tensor')"
    assert tied.resident_bytes == tied.file_bytes == int(IntGrid(8).bytes((96, 64)))
    assert artifact.ledger.summary.resident_bytes <= artifact.ledger.summary.file_bytes
    reference, found = model(ids).detach(), artifact(ids=ids)
    assert float((found - reference).norm() / reference.norm()) < (0.03 if recipe == "w8" else 0.3)


def test_w4_degrades_where_nothing_tells_sites_apart() -> None:
    """Whole numbers out, and layers too small for the budget: every site stays in 4 bits, and remarks say why."""

    class Choice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(32, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x).argmax(-1)

    artifact = sparc.compile(Choice(), (torch.randn(4, 32),), recipe="w4", measure=False)
    assert {row.encoding for row in artifact.ledger.sites} == {str(INT4)}
    assert any("no site is rounded to" in each.what for each in artifact.diagnostics)


class Experts(nn.Module):
    """Products with a batch of matrices, on all rows of an input whose size the result takes over."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.outer = nn.Parameter(torch.randn(3, 16, 24) / 4), nn.Parameter(torch.randn(3, 24, 16) / 5)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).expand(3, -1, -1)
        return torch.bmm(torch.relu(torch.bmm(rows, self.inner)), self.outer).sum(0).view(x.shape)


@pytest.mark.parametrize("recipe", ["w8a8", "w8a8-static"])
def test_inputs_of_stacked_experts_are_quantized(recipe: str) -> None:
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))
    artifact = sparc.compile(Experts().eval(), {"x": x}, recipe=recipe, dynamic={"x": {1: "length"}}, measure=False)
    assert "sparc.quantize" in artifact.program.text()
    with torch.no_grad():
        assert relative_error(Experts()(x), artifact(x)) < 0.05
