"""The sweep: every architecture is compiled with 8-bit weights, and its artifact agrees with the compiled program and
with eager torch, at the sizes of the example and at others. What cannot be compiled is refused with the code that
docs/architectures.md gives.
"""

from collections.abc import Iterable, Mapping

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import sparc
from docs.architectures_page import PAGE, page
from sparc.codegen.onnx.check import check_parity
from sparc.diag import SparcError
from tests.architecture_outcomes import FLOOR_DB, REFUSED, SWEPT
from tests.architectures import Built

SIZES: tuple[Mapping[str, int], ...] = (
    {},
    {"batch": 3, "images": 4, "seq": 11, "source": 13, "target": 9},
    {"batch": 1, "images": 1, "seq": 3, "source": 3, "target": 2},
)


def compiled(built: Built) -> sparc.Artifact:
    return sparc.compile(
        built.model, dict(built.inputs), recipe="w8", target="onnx", dynamic=built.dynamic, measure=False
    )


def tensors(output: object) -> list[Tensor]:
    return [each for each in pytree.tree_leaves(output) if isinstance(each, Tensor)]


def signal_to_noise(want: Tensor, got: Tensor, of_tokens: bool = False) -> float:
    """In decibels, of the whole or the median one of the tokens; integers are either equal or not."""
    assert (want.shape, want.dtype) == (got.shape, got.dtype)
    if not want.is_floating_point():
        return torch.inf if torch.equal(want, got) else -torch.inf
    axes = -1 if of_tokens else tuple(range(want.ndim))
    signal, noise = (each.double().square().sum(axes) for each in (want, want.double() - got.double()))
    return float((10 * torch.log10(signal / noise.clamp_min(1e-300))).median())


def each_alone(names: Iterable[str]) -> list[object]:
    """Parameters that any worker may take: nothing is shared, and the sweep is most of `make test-all`."""
    return [pytest.param(name, marks=pytest.mark.xdist_group(f"sweep {name}")) for name in names]


@pytest.mark.slow
@pytest.mark.parametrize("name", each_alone(name for name in SWEPT if name not in REFUSED))
def test_artifact_agrees_with_its_program_and_with_eager(name):
    built = SWEPT[name].build().enlivened()
    artifact = compiled(built)
    assert any(row.encoding != "dense" for row in artifact.ledger.sites)
    signature, runner = artifact.program.main.signature, artifact.emission.runner()
    for sizes in SIZES:
        inputs = built.resized(sizes)
        with torch.no_grad():
            want = tensors(built.model(**inputs))
        flat = signature.bind((), inputs)
        check_parity(artifact.program, runner, flat, reference=dict(zip(signature.output_names, want, strict=True)))
        for output, a, b in zip(signature.output_names, want, artifact.run_flat(flat), strict=True):
            found = signal_to_noise(a, b, of_tokens=SWEPT[name].kind == "experts")
            assert found >= FLOOR_DB, f"{output} at {sizes or 'the sizes of the example'}"


@pytest.mark.slow
@pytest.mark.parametrize("name", each_alone(REFUSED))
def test_refusal_is_the_one_documented(name):
    with pytest.raises(SparcError) as caught:
        compiled(SWEPT[name].build())
    assert caught.value.code == REFUSED[name].code
    assert REFUSED[name].where in str(caught.value.diagnostic.where)


def test_page_is_up_to_date():
    assert PAGE.read_text(encoding="utf-8") == page(), "run `make docs`"
