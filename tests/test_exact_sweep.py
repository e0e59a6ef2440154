"""The sweep of exact passes: on every architecture none raises, none is slow, and together they change no output."""

import time

import pytest
import torch
from torch.utils import _pytree as pytree

from sparc.capture import capture
from sparc.driver import Driver
from sparc.pass_base import Pass, Samples
from sparc.passes.canonicalize import Canonicalize
from sparc.passes.coalesce import MergeNeurons, coalesce_parallel
from sparc.passes.fold import (
    fold_affine,
    fold_batch_norm,
    fold_batch_norm_before,
    fold_norm_affine,
    fold_shared,
    fold_table,
)
from sparc.passes.rotate import Rotate
from sparc.verify import relative_error
from tests.architecture_outcomes import REFUSED, SWEPT

EXACT: tuple[Pass, ...] = (
    fold_batch_norm,
    fold_batch_norm_before,
    fold_shared,
    fold_affine,
    fold_table,
    fold_norm_affine,
    MergeNeurons(),
    Rotate(),
    coalesce_parallel,
)
QUICK = ("bert", "llama", "poolformer", "resnet")
SECONDS = 1.0  # of a pass that finds nothing; measured again as processor time, since the machine may be busy


def swept() -> list[object]:
    """Architectures that can be captured; most of them are slow."""
    names = sorted(SWEPT.keys() - REFUSED.keys())
    return [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", swept())
def test_exact_passes_keep_the_outputs(name):
    built = SWEPT[name].build()
    program = capture(built.model, dict(built.inputs), dynamic=built.dynamic)
    flat = program.main.signature.bind((), dict(built.inputs))
    driver = Driver(program, Samples({"forward": [flat]}), verify="sample")
    driver.run(Canonicalize())
    for step in EXACT:
        row = driver.run(step)
        assert row.changed or _seconds(driver, step, row.seconds) < SECONDS, step.name
    with torch.no_grad():
        expected = [each for each in pytree.tree_leaves(built.model(**built.inputs)) if isinstance(each, torch.Tensor)]
    pairs = zip(expected, driver.program.run_flat(flat), strict=True)
    assert max(relative_error(a, b) for a, b in pairs) <= 1e-4


def _seconds(driver: Driver, step: Pass, once: float) -> float:
    """How long a pass takes that changes nothing."""
    if once < SECONDS:
        return once
    started = time.process_time()
    driver.run(step)
    return min(once, time.process_time() - started)
