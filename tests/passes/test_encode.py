"""Encode: bitwise exact for every kind of site, tied weights once, nothing under a name that is taken."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from sparc.analysis.sites import find_sites
from sparc.encoding.base import Encoding
from sparc.encoding.grid import Grid
from sparc.encoding.int_grid import IntGrid
from sparc.encoding.nm import NM
from sparc.encoding.operators import is_decode
from sparc.pass_base import PassContext
from sparc.passes.encode import Encode
from sparc.passes.prune import Prune
from sparc.passes.round import Round
from sparc.program import Program
from tests.passes.models import driver, models, run

SPECS = (
    IntGrid(8),
    IntGrid(8, group="tensor", symmetric=False),
    IntGrid(4, group=5, symmetric=False),
    IntGrid(4, group=8, symmetric=False, zero="minimum"),
    IntGrid(2, group=4),
    IntGrid(3, group=4),
)


def decodes(program: Program) -> list[torch.fx.Node]:
    return [node for _, node in program.nodes() if is_decode(node)]


@pytest.mark.parametrize("kind", list(models()))
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_outputs_stay_bitwise_equal(kind: str, spec: Encoding) -> None:
    model, inputs = models()[kind]
    rounded = driver(model, inputs)
    rounded.run(Round(spec))
    before = rounded.program
    row = rounded.run(Encode())
    after = rounded.program
    assert row.measured == {"end to end": 0.0}
    assert torch.equal(before.run(*inputs), after.run(*inputs))
    gridded = [name for name in before.weights if before.grid(name) is not None]
    assert len(decodes(after)) == len(gridded) == row.matches
    assert not set(gridded) & set(after.weights)
    assert after.weights.nbytes < before.weights.nbytes


def test_biases_are_not_touched() -> None:
    model, inputs = models()["linear"]
    program = run(model, inputs, Round(), Encode())
    assert torch.equal(program.weights["0.bias"], model[0].bias)
    assert {"0.weight_codes", "0.weight_scale"} <= set(program.weights)


def test_a_tied_weight_is_stored_once_and_decoded_once() -> None:
    model, inputs = models()["tied"]
    program = run(model, inputs, Round(), Encode())
    parts = [name for name in program.weights if name.startswith("embedding.")]
    assert parts == ["embedding.weight_codes", "embedding.weight_scale"]
    (shared,) = (node for node in decodes(program) if len(node.users) == 2)
    assert {user.target for user in shared.users} == {torch.ops.aten.embedding.default, torch.ops.aten.linear.default}


def test_every_entry_decodes_the_same_parts() -> None:
    model, inputs = models()["linear"]
    chosen = driver(model, inputs)
    chosen.program.entries["again"] = chosen.program.main.clone()
    chosen.samples.held_out["again"] = chosen.samples.held_out["forward"]
    chosen.run(Round())
    chosen.run(Encode())
    program = chosen.program
    names = [[str(part.target) for part in node.args[0]] for node in decodes(program)]
    assert names[:2] == names[2:] == [["0.weight_codes", "0.weight_scale"], ["2.weight_codes", "2.weight_scale"]]
    assert torch.equal(program.run(*inputs), program.run(*inputs, entry="again"))
    found, _ = find_sites(program)
    assert [(site.weight, site.encoded, len(site.uses)) for site in found] == [
        ("0.weight", True, 2),
        ("2.weight", True, 2),
    ]


def test_parts_never_take_a_name_that_exists() -> None:
    class Taken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(16, 16, bias=False)
            self.inner.register_buffer("weight_codes", torch.arange(16.0))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x) + self.inner.weight_codes

    model = Taken()
    program = run(model, (torch.randn(2, 16),), Round(), Encode())
    assert torch.equal(program.weights["inner.weight_codes"], torch.arange(16.0))
    assert program.weights["inner.weight_codes_1"].dtype == torch.int8


def test_masks_are_encoded() -> None:
    model, inputs = models()["linear"]
    program = run(model, inputs, Prune(NM(2, 4)), Encode())
    assert program.weights["0.weight_codes"].shape == (24, 12)
    assert [str(node.args[1]) for node in decodes(program)] == ["NM(n=2, m=4)", "NM(n=2, m=4)"]


def test_it_works_at_every_dtype() -> None:
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        model = nn.Linear(16, 8).to(dtype)
        inputs = (torch.randn(3, 16).to(dtype),)
        rounded = run(model, inputs, Round(IntGrid(4, group=8)))
        encoded = run(model, inputs, Round(IntGrid(4, group=8)), Encode())
        assert torch.equal(rounded.run(*inputs), encoded.run(*inputs))
        assert encoded.run(*inputs).dtype == dtype


def test_a_value_that_left_its_grid_is_skipped_with_a_remark() -> None:
    model, inputs = models()["linear"]
    program = run(model, inputs, Round())
    grid = program.grid("0.weight")
    assert isinstance(grid, Grid)
    program.set_weight("0.weight", program.weights["0.weight"] + 1e-3, replace(grid))
    context = PassContext()
    Encode().run(program, context)
    assert [row.where for row in context.skips] == ["0.weight"]
    assert "does not lie on its grid" in next(iter(context.skips)).why
    assert "0.weight" in program.weights
    assert "2.weight_codes" in program.weights


def test_nothing_on_a_grid_means_nothing_to_do() -> None:
    model, inputs = models()["linear"]
    chosen = driver(model, inputs)
    text = chosen.program.text()
    assert chosen.run(Encode()).changed == 0
    assert chosen.program.text() == text
