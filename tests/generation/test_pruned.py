"""Heads of keys and values that are cut: the cache has another shape, and generation goes on with it."""

import json
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import sparc
from sparc.analysis.dependency import groups
from sparc.artifact import Artifact
from sparc.cache import CacheSlot, fit
from sparc.contract import Approximate
from sparc.diag import ArtifactError, Diagnostics, LoweringError, VerifyError
from sparc.differences import layer_differences
from sparc.driver import Driver
from sparc.encoding.int_grid import IntGrid
from sparc.generation.genai import genai_config
from sparc.pass_base import Pass, PassContext, Samples, Stage
from sparc.passes.canonicalize import Canonicalize
from sparc.passes.coalesce.units import obstacle
from sparc.passes.cut import cut, cut_groups, mask
from sparc.passes.cut.prune_units import PruneUnits
from sparc.passes.encode import Encode
from sparc.passes.prune.permute import PermuteChannels
from sparc.passes.recipes import prepare
from sparc.passes.round import Round
from sparc.program import Program
from sparc.serialize.cache import cache_from_json, cache_to_json
from sparc.verify import relative_error
from tests.generation.decoders import decoder, prompts

KINDS = ("head", "head_dim", "queries of a head", "neuron")


@cache
def captured(name: str) -> tuple[Program, tuple[Tensor, ...]]:
    """A decoder with its cache, in its canonical form, and a call of it with five places in the cache."""
    from sparc.api import _capture
    from sparc.generation.task import prepare_task

    task = prepare_task("text-generation", decoder(name), None)
    program = _capture(task, Diagnostics())
    Canonicalize().run(program, PassContext())
    program.sweep()
    return program, tuple(program.main.signature.bind((), task.entries["forward"].example_inputs))


@cache
def pruned(name: str, target: str = "reference") -> Artifact:
    step = PruneUnits(keep=0.5, multiple=1)
    return sparc.compile(decoder(name), task="text-generation", recipe=[*prepare(), step], target=target, measure=False)


def with_zeros(before: Program, after: Program, flat: tuple[Tensor, ...]) -> list[Tensor]:
    """A call whose cache is zero where the other program's has no place."""
    assert after.main.cache is not None
    kept = {slot.input: slot.kept for slot in after.main.cache.slots}
    found = []
    for name, tensor in zip(before.main.signature.input_names, flat, strict=True):
        for axis, places in kept.get(name, ()):
            gone = [place for place in range(tensor.shape[axis]) if place not in places]
            tensor = tensor.index_fill(axis, torch.tensor(gone), 0.0)
        found.append(tensor)
    return found


SLOW = pytest.mark.slow


@pytest.mark.parametrize("name", ["llama", *(pytest.param(name, marks=SLOW) for name in ("gpt2", "phi3"))])
def test_a_smaller_cache_is_one_with_zeros(name: str) -> None:
    program, flat = captured(name)
    compared = 0
    for at, group in enumerate(groups(program)):
        if group.kind not in KINDS or group.frozen or group.statistic or group.units < 2:
            continue
        small, masked = program.clone(), program.clone()
        keep = range(1, group.units)
        cut(small, groups(small)[at], keep)
        mask(masked, groups(masked)[at], keep)
        given = fit(small.main, flat)
        expected = masked.run_flat(with_zeros(program, small, flat), wide=True)
        assert relative_error(expected[0], small.run_flat(given, wide=True)[0]) < 1e-9, str(group)
        compared += any(a.shape != b.shape for a, b in zip(flat, given, strict=True))
    assert compared >= 4  # heads, and channels of keys and values


def test_slots_say_what_is_left_after_several_cuts() -> None:
    program = captured("gpt2")[0].clone()
    for keep in ([0, 2, 3], [1, 2]):
        (first, *_) = [group for group in groups(program) if group.kind == "head"]
        cut_groups(program, {first: keep})
    assert program.main.cache is not None
    slot = program.main.cache.slots[0]
    assert slot == CacheSlot("past_key_values.0.key", "present.0.key", 2, ((1, (2, 3)),))
    types = dict(zip(program.main.signature.input_names, program.main.placeholders, strict=True))
    assert types[slot.input].meta["val"].shape[1] == 2


def test_exact_passes_leave_the_cache_alone() -> None:
    (head, *_) = [group for group in groups(captured("llama")[0]) if group.kind == "head"]
    assert obstacle(head) == "the cache holds them"
    program, flat = captured("llama")
    samples = {"forward": [list(flat)]}
    driver = Driver(program, Samples(samples, samples))
    driver.run(PermuteChannels())
    assert any("the cache holds them" in skip.why for skip in driver.ledger.passes[-1].skips)
    assert driver.ledger.passes[-1].matches > 0  # the neurons


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("llama", "onnx"),
        pytest.param("gpt2", "reference", marks=SLOW),
        pytest.param("mistral", "reference", marks=SLOW),
    ],
)
def test_generated_tokens_are_those_of_the_whole_sequence(name: str, target: str, tmp_path: Path) -> None:
    artifact = pruned(name, target)
    assert artifact.program.main.cache is not None
    assert all(slot.kept for slot in artifact.program.main.cache.slots)
    tokens = prompts()["input_ids"][:1]
    found = artifact.generate(tokens, max_new_tokens=6, do_sample=False)
    for _ in range(6):
        logits = artifact.program.run(input_ids=tokens)["logits"]
        tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(found, tokens)
    artifact.save(tmp_path / "artifact")
    loaded = sparc.load(tmp_path / "artifact")
    assert loaded.program.main.cache == artifact.program.main.cache
    assert torch.equal(loaded.generate(**prompts(), max_new_tokens=6), artifact.generate(**prompts(), max_new_tokens=6))


@pytest.mark.slow
def test_pruned_and_rounded_and_measured_against_the_whole() -> None:
    recipe = [*prepare(), PruneUnits(keep=0.5, multiple=1, compensate=True), Round(IntGrid(8)), Encode()]
    artifact = sparc.compile(
        decoder("llama"), task="text-generation", recipe=recipe, target="reference", data=[prompts()] * 4
    )
    summary = artifact.ledger.summary
    assert 0 < summary.errors["logits"]["cosine"] < 1
    assert len(summary.latencies) >= 2
    row = next(row for row in artifact.ledger.passes if row.name.startswith("prune_units"))
    assert 0 < row.measured["worst cosine, end to end"] < 1


@pytest.mark.parametrize(
    "kept", [[[1]], [[1, [0, 1, 2]]], [[2, [0]]], [[1, [-1]]], [[1, [0]], [1, [0]]], [[9, [0]]], [[1, ["0"]]], 5]
)
def test_places_that_a_cache_does_not_have_are_refused(kept: Any) -> None:
    entry = pruned("llama", "onnx").program.main
    assert entry.cache is not None
    described = json.loads(json.dumps(cache_to_json(entry.cache)))
    assert cache_from_json(described, entry) == entry.cache
    described["slots"][0][3] = kept
    with pytest.raises(ArtifactError, match="SPARC503"):
        cache_from_json(described, entry)


@pytest.mark.slow
def test_genai_is_told_the_smaller_cache() -> None:
    artifact = pruned("llama", "onnx")
    config = json.loads(genai_config(artifact))["model"]["decoder"]
    assert (config["num_key_value_heads"], config["num_attention_heads"], config["head_size"]) == (1, 2, 8)
    uneven = sparc.compile(
        decoder("llama"), task="text-generation", measure=False,
        recipe=sparc.Recipe(
            (*map(sparc.Step, prepare()), sparc.Step(PruneUnits(kinds=("head",), keep=0.5), where="*.layers.0")),
        ),
    )  # fmt: skip
    with pytest.raises(LoweringError, match="equal heads in all layers"):
        genai_config(uneven)


def test_calls_of_the_whole_model_fit() -> None:
    program, flat = captured("llama")
    small = program.clone()
    (head, *_) = [group for group in groups(small) if group.kind == "head"]
    cut(small, head, [1])
    given = fit(small.main, flat)
    assert [tensor.shape[1] for tensor in given[4:6]] == [1, 1]
    assert all(torch.equal(a, b) for a, b in zip(given, fit(small.main, given), strict=True))
    assert torch.equal(given[4], flat[4][:, 1:])
    found = {each.name for each in layer_differences(program, small, flat)}
    assert "linear_6" in found  # down_proj of the first layer
    assert "linear" not in found  # q_proj


@dataclass(frozen=True)
class Forget(Pass):
    """It says that a head of the cache is gone, which is there."""

    name: ClassVar[str] = "forget"
    stage: ClassVar[Stage] = Stage.CUT
    scope: ClassVar[str] = "program"

    @property
    def contract(self) -> Approximate:
        return Approximate()

    def run(self, program: Program, context: PassContext) -> None:
        cache = program.main.cache
        assert cache is not None
        program.main.cache = replace(cache, slots=(cache.slots[0].cut(1, [0]), *cache.slots[1:]))


def test_a_cache_that_is_not_what_it_says_is_refused() -> None:
    program, flat = captured("llama")
    samples = {"forward": [list(flat)]}
    with pytest.raises(VerifyError, match="SPARC304"):
        Driver(program, Samples(samples, samples)).run(Forget())
