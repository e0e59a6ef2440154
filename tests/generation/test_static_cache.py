"""A cache in buffers gives what explicit tensors give, and is written in place."""

from functools import cache
from typing import Any

import pytest
import torch

import sparc
from sparc.artifact import Artifact
from sparc.generation.session import ExplicitCache, Session
from sparc.generation.static_cache import StaticCache, in_place
from tests.generation.decoders import decoder, prompts


@cache
def compiled(name: str, target: str = "reference", recipe: str = "dense") -> Artifact:
    return sparc.compile(decoder(name), task="text-generation", recipe=recipe, target=target, measure=False)


def explicit(artifact: Artifact, batch: int) -> Session:
    entry = artifact.program.main
    return Session(entry, ExplicitCache(entry, batch, artifact.run_flat), batch, 64)


@pytest.mark.parametrize("name", ["llama", "gpt2", pytest.param("qwen3_moe", marks=pytest.mark.slow)])
def test_buffers_give_what_tensors_give(name: str) -> None:
    artifact = compiled(name)
    session = artifact.session(batch=2, length=20)
    assert isinstance(session._run, StaticCache)
    own = artifact.generate(**prompts(), max_new_tokens=8, session=session)
    other = artifact.generate(**prompts(), max_new_tokens=8, session=explicit(artifact, 2))
    assert torch.equal(own, other)


def test_nothing_is_allocated_or_copied_while_it_grows() -> None:
    artifact = compiled("llama")
    session = artifact.session(length=12)
    run: Any = session._run
    session.feed(prompts(1)["input_ids"])
    before = {name: (buffer.data_ptr(), buffer[:, :, :6].clone()) for name, buffer in run._buffers.items()}
    session.feed(torch.tensor([[7]]))
    for name, (place, front) in before.items():
        assert run._buffers[name].data_ptr() == place
        assert torch.equal(run._buffers[name][:, :, :6], front)
        assert run._buffers[name][:, :, 6].abs().sum() > 0
        assert run._buffers[name][:, :, 7:].abs().sum() == 0


def test_cutting_forgets_what_came_later() -> None:
    artifact = compiled("llama")
    session = artifact.session(length=12)
    ids = prompts(1)["input_ids"]
    first = session.feed(ids)
    session.feed(torch.tensor([[7, 8]]))
    session.cut(5)
    torch.testing.assert_close(session.feed(ids[:, 5:]), first)


@pytest.mark.slow
def test_generated_kernels_write_into_the_buffers() -> None:
    artifact = compiled("llama", "cuda:sm_90", "w8")
    session = artifact.session(batch=2, length=16)
    assert isinstance(session._run, StaticCache)
    found = artifact.generate(**prompts(), max_new_tokens=4, session=session)
    expected = compiled("llama", "reference", "w8").generate(**prompts(), max_new_tokens=4)
    assert torch.equal(found, expected)


def test_a_cache_that_grows_at_its_front_is_left_as_tensors() -> None:
    artifact = compiled("llama")
    entry = artifact.program.main.clone()
    assert entry.cache is not None
    names = entry.signature.input_names, entry.signature.output_names
    assert in_place(entry.graph, entry.cache, *names) is not None
    grown: Any = entry.output.args[0][1]  # type: ignore[index]
    grown.args = (list(reversed(grown.args[0])), *grown.args[1:])
    assert in_place(entry.graph, entry.cache, *names) is None
