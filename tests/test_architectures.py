"""The sweep: every architecture is captured, canonicalised and compared with eager. Slow; prints a table of results."""

from collections import Counter

import pytest
import torch
from torch.utils import _pytree as pytree

from sparc.capture import capture
from sparc.driver import Driver
from sparc.pass_base import Samples
from sparc.passes.canonicalize import Canonicalize
from sparc.verify import relative_error
from tests.architectures import ARCHITECTURES

pytestmark = pytest.mark.slow
RESULTS: dict[str, str] = {}


@pytest.fixture(scope="module", autouse=True)
def table():
    """Print what became of each architecture."""
    yield
    kinds = Counter(ARCHITECTURES[name].kind for name, result in RESULTS.items() if result == "ok")
    print(f"\n{sum(kinds.values())} of {len(RESULTS)} architectures: {dict(kinds)}")
    print("\n".join(f"{name}: {result}" for name, result in RESULTS.items() if result != "ok"))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_canonical_program_equals_eager(name):
    RESULTS[name] = "failed"
    built = ARCHITECTURES[name].build()
    program = capture(built.model, dict(built.inputs), dynamic=built.dynamic)
    flat = program.main.signature.bind((), dict(built.inputs))
    driver = Driver(program, Samples({"forward": [flat]}), verify="full")
    driver.run(Canonicalize())
    with torch.no_grad():
        expected = [each for each in pytree.tree_leaves(built.model(**built.inputs)) if isinstance(each, torch.Tensor)]
    pairs = zip(expected, driver.program.run_flat(flat), strict=True)
    assert max(relative_error(a, b) for a, b in pairs) <= 1e-4
    assert not driver.run(Canonicalize()).changed
    RESULTS[name] = "ok"


def test_there_are_enough_of_every_kind():
    kinds = Counter(architecture.kind for architecture in ARCHITECTURES.values())
    assert len(ARCHITECTURES) >= 40
    assert set(kinds) == {"encoder", "decoder", "experts", "encoder-decoder", "vision", "speech", "multimodal"}
