"""Sessions that keep the cache: step by step they give what the program gives on the whole."""

import pytest
import torch
from torch import Tensor

from sparc.artifact import Artifact
from sparc.cache import token_positions
from sparc.codegen.onnx.emission import OnnxEmission
from sparc.codegen.onnx.session import CacheSession
from sparc.diag import ArtifactError
from tests.codegen.decoders import compiled

IN_PLACE, PASSED = "mistral", "bloom"


def opened(name: str, batch: int = 2, length: int = 16) -> tuple[Artifact, CacheSession]:
    artifact = compiled(name)
    assert isinstance(artifact.emission, OnnxEmission)
    return artifact, artifact.emission.session(None, batch, length, threads=1)


def step(tokens: Tensor, mask: Tensor, start: int, end: int) -> dict[str, Tensor]:
    """A call's inputs for the tokens from `start` to `end`."""
    seen = mask[:, :end]
    return {
        "input_ids": tokens[:, start:end], "attention_mask": seen,
        "position_ids": token_positions(seen, end - start), "logits_to_keep": torch.arange(end - start),
    }  # fmt: skip


def assert_close(got: Tensor, want: Tensor, mask: Tensor, start: int) -> None:
    """Logits from `start` on, at places that are not hidden."""
    end = start + got.shape[1]
    seen = mask[:, start:end] != 0
    torch.testing.assert_close(got[seen], want[:, start:end][seen], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [IN_PLACE, PASSED])
def test_steps_give_what_one_call_gives(name: str) -> None:
    """A prompt, single tokens, several tokens at once behind them, a hidden row start, another try after a cut."""
    artifact, session = opened(name)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, 97, (2, 12), generator=generator)
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[0, :2] = 0
    want = artifact(input_ids=tokens, attention_mask=mask)["logits"]
    bounds = [(0, 5), (5, 6), (6, 7), (7, 10), (10, 12)]
    for start, end in bounds:
        got = session(step(tokens, mask, start, end))
        assert set(got) == {"logits"}
        assert_close(got["logits"], want, mask, start)
    session.cut(6)
    assert session.length == 6
    assert_close(session(step(tokens, mask, 6, 9))["logits"], want, mask, 6)
    session.reset()
    assert_close(session(step(tokens, mask, 0, 3))["logits"], want, mask, 0)


def test_the_cache_is_written_where_it_lies() -> None:
    """No call makes new tensors for a cache that `GroupQueryAttention` keeps."""
    _, session = opened(IN_PLACE)
    before = {name: each.data_ptr() for name, each in session._slots.items()}
    tokens, mask = torch.ones(2, 4, dtype=torch.int64), torch.ones(2, 4, dtype=torch.int64)
    session(step(tokens, mask, 0, 3))
    session(step(tokens, mask, 3, 4))
    assert before == {name: each.data_ptr() for name, each in session._slots.items()}
    used = [each.abs().sum((0, 1, 3)) > 0 for each in session._slots.values()]
    assert all(each.tolist() == [True] * 4 + [False] * 12 for each in used)


@pytest.mark.parametrize("name", [IN_PLACE, PASSED])
def test_sessions_of_an_entry_share_the_runtime_but_not_the_cache(name: str) -> None:
    """Opening ONNX Runtime's session takes as long as many tokens; another number of threads needs another one."""
    artifact, first = opened(name)
    assert isinstance(artifact.emission, OnnxEmission)
    second = artifact.emission.session(None, 2, 16, threads=1)
    assert second._runner is first._runner
    assert artifact.emission.session(None, 2, 16, threads=2)._runner is not first._runner
    tokens, mask = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]]), torch.ones(2, 4, dtype=torch.int64)
    want = artifact(input_ids=tokens, attention_mask=mask)["logits"]
    first(step(tokens.flip(0), mask, 0, 4))
    for start, end in [(0, 3), (3, 4)]:
        assert_close(second(step(tokens, mask, start, end))["logits"], want, mask, start)


@pytest.mark.parametrize("name", [IN_PLACE, PASSED])
def test_a_full_cache_is_an_error(name: str) -> None:
    _, session = opened(name, batch=1, length=4)
    tokens, mask = torch.ones(1, 5, dtype=torch.int64), torch.ones(1, 5, dtype=torch.int64)
    session(step(tokens, mask, 0, 4))
    with pytest.raises(ArtifactError, match=r"SPARC506.*holds 4 places"):
        session(step(tokens, mask, 4, 5))
    assert session.length == 4
    with pytest.raises(ArtifactError, match="SPARC506"):
        session.cut(5)
    session.reset()
    with pytest.raises(ArtifactError, match=r"SPARC506.*rows"):
        session(step(tokens.expand(2, -1), mask.expand(2, -1), 0, 1))
    with pytest.raises(ArtifactError, match=r"SPARC506.*position_ids"):
        session({"input_ids": tokens, "attention_mask": mask, "logits_to_keep": torch.arange(1)})
