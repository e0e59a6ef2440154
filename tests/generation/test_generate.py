"""Artifacts generate what the model generates: greedy, in batches with padding, resumed, and to the last place."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import sparc
from sparc.artifact import Artifact
from sparc.diag import ArtifactError, CaptureError
from sparc.generation.adapter import as_transformers
from tests.generation.decoders import VOCABULARY, decoder, prompts


@cache
def served(name: str, target: str = "reference") -> tuple[Any, Artifact]:
    """A tiny decoder, and what became of it."""
    model = decoder(name)
    return model, compiled(model, target)


def compiled(model: Any, target: str = "reference", recipe: str = "dense") -> Artifact:
    return sparc.compile(model, task="text-generation", recipe=recipe, target=target, measure=False)


@pytest.fixture(scope="module")
def artifact() -> Artifact:
    return served("llama", "onnx")[1]


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("llama", "onnx"),
        ("mistral", "reference"),
        ("gpt2", "onnx"),
        ("bloom", "reference"),
        pytest.param("gemma2", "reference", marks=pytest.mark.slow),
    ],
)
def test_greedy_tokens_are_the_models(name: str, target: str) -> None:
    model, artifact = served(name, target)
    expected = model.generate(**prompts(), max_new_tokens=10, do_sample=False)
    assert torch.equal(artifact.generate(**prompts(), max_new_tokens=10, do_sample=False), expected)


def test_padding_may_be_on_either_side(artifact: Artifact) -> None:
    left = prompts()
    right = {name: value.clone() for name, value in left.items()}
    for value in right.values():
        value[1] = value[1].roll(-3)
    new = artifact.generate(**left, max_new_tokens=6)[:, 6:]
    assert torch.equal(artifact.generate(**right, max_new_tokens=6)[:, 6:], new)


def test_logits_step_by_step() -> None:
    llama, artifact = served("llama", "onnx")
    ids = prompts(1, 9)["input_ids"]
    session = artifact.session(length=9)
    logits = [session.feed(ids[:, :4])] + [session.feed(ids[:, place : place + 1]) for place in range(4, 9)]
    with torch.no_grad():
        expected = llama(ids).logits[0, 3:]
    torch.testing.assert_close(torch.cat(logits), expected, rtol=1e-4, atol=1e-5)


def test_a_session_goes_on(artifact: Artifact) -> None:
    ids = prompts(1, 12)["input_ids"]
    session = artifact.session()
    first = artifact.generate(ids[:, :5], max_new_tokens=4, session=session)
    again = artifact.generate(ids[:, 5:], max_new_tokens=4, session=session)
    whole = torch.cat([first, ids[:, 5:]], dim=1)
    assert torch.equal(again[:, 7:], artifact.generate(whole, max_new_tokens=4)[:, 16:])


def test_a_session_can_be_cut(artifact: Artifact) -> None:
    ids = prompts(1, 8)["input_ids"]
    session = artifact.session(length=16)
    before = session.feed(ids[:, :6])
    session.feed(ids[:, 6:])
    session.cut(5)
    torch.testing.assert_close(session.feed(ids[:, 5:6]), before)
    with pytest.raises(ArtifactError, match="SPARC511"):
        session.cut(7)


def test_the_cache_is_used_to_its_last_place(artifact: Artifact) -> None:
    ids = prompts(1, 6)["input_ids"]
    assert artifact.generate(ids, max_new_tokens=59).shape == (1, 65)  # the last token needs no place
    with pytest.raises(ArtifactError, match="SPARC511"):
        artifact.generate(ids, max_new_tokens=60)
    with pytest.raises(ArtifactError, match="SPARC511"):
        artifact.session(length=65)
    with pytest.raises(ArtifactError, match="SPARC511"):
        artifact(input_ids=torch.ones(1, 65, dtype=torch.int64))


def test_a_row_that_ended_is_padded_and_the_others_go_on(artifact: Artifact) -> None:
    free = artifact.generate(**prompts(), max_new_tokens=8)[:, 6:]
    end = int(free[0, 2])
    assert end not in free[0, :2]
    found = artifact.generate(**prompts(), max_new_tokens=8, eos_token_id=[end, 96], pad_token_id=0)[:, 6:]
    assert found[0].tolist() == [*free[0, :3].tolist(), 0, 0, 0, 0, 0][: found.shape[1]]
    stop = free[1].tolist().index(end) + 1 if end in free[1] else 8
    assert found[1, :stop].tolist() == free[1, :stop].tolist()


def test_everything_ended_ends_early(artifact: Artifact) -> None:
    ids = prompts(1)["input_ids"]
    first = int(artifact.generate(ids, max_new_tokens=1)[0, -1])
    assert len(list(artifact.stream(ids, max_new_tokens=9, eos_token_id=first))) == 1


def test_the_models_own_settings_are_the_defaults() -> None:
    model = decoder("llama")
    first = int(model.generate(prompts(1)["input_ids"], max_new_tokens=1, do_sample=False)[0, -1])
    model.generation_config.eos_token_id = first
    assert compiled(model).generate(prompts(1)["input_ids"], max_new_tokens=9).shape == (1, 7)


def test_a_saved_artifact_generates(artifact: Artifact, tmp_path: Path) -> None:
    artifact.save(tmp_path / "out")
    loaded = sparc.load(tmp_path / "out")
    assert loaded.attachments.keys() == {"config.json", "generation_config.json"}
    assert loaded.program.main.cache == artifact.program.main.cache
    expected = artifact.generate(**prompts(), max_new_tokens=5)
    assert torch.equal(loaded.generate(**prompts(), max_new_tokens=5), expected)


@pytest.mark.parametrize("name", ["mistral"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 2}, {"num_return_sequences": 2,
                         "num_beams": 2}], ids=["greedy", "beams", "lookup", "sequences"])  # fmt: skip
def test_transformers_generates_with_it(name: str, options: dict[str, Any]) -> None:
    model, artifact = served(name)
    given = prompts(1) if "prompt_lookup_num_tokens" in options else prompts()
    expected = model.generate(**given, max_new_tokens=8, do_sample=False, **options)
    adapted = as_transformers(artifact)
    assert torch.equal(adapted.generate(**given, max_new_tokens=8, do_sample=False, **options), expected)


@pytest.mark.parametrize(
    ("given", "code"),
    [
        ({"input_ids": torch.zeros(2, 3)}, "SPARC512"),
        ({"input_ids": torch.zeros(3, dtype=torch.int64)}, "SPARC512"),
        ({"input_ids": [[1, 2]]}, "SPARC512"),
        ({"input_ids": torch.ones(1, 0, dtype=torch.int64)}, "SPARC512"),
        ({"input_ids": torch.ones(0, 2, dtype=torch.int64)}, "SPARC512"),
        ({"input_ids": torch.full((1, 2), VOCABULARY)}, "SPARC512"),
        ({"input_ids": torch.full((1, 2), -1)}, "SPARC512"),
        ({"input_ids": torch.ones(2, 2, dtype=torch.int64), "attention_mask": torch.tensor([[1, 1], [0, 0]])},
         "SPARC512"),
        ({"input_ids": torch.ones(2, 2, dtype=torch.int64), "attention_mask": torch.ones(2, 3)}, "SPARC512"),
        ({"input_ids": torch.ones(1, 2, dtype=torch.int64), "max_length": 3}, "SPARC209"),
        ({"input_ids": torch.ones(1, 2, dtype=torch.int64), "max_new_tokens": 0}, "SPARC209"),
        ({"input_ids": torch.ones(1, 2, dtype=torch.int64), "temperature": 0.0}, "SPARC209"),
        ({"input_ids": torch.ones(1, 2, dtype=torch.int64), "top_p": 1.5}, "SPARC209"),
        ({"input_ids": torch.ones(1, 2, dtype=torch.int64), "top_k": -1}, "SPARC209"),
    ],
)  # fmt: skip
def test_bad_prompts_and_options(artifact: Artifact, given: dict[str, Any], code: str) -> None:
    with pytest.raises(ArtifactError, match=code):
        artifact.generate(**given)


def test_a_session_of_another_batch(artifact: Artifact) -> None:
    with pytest.raises(ArtifactError, match="SPARC512"):
        artifact.generate(**prompts(), session=artifact.session(batch=1))


def test_a_mask_of_another_length(artifact: Artifact) -> None:
    with pytest.raises(ArtifactError, match=r"SPARC506.*6 places, not 5"):
        artifact(input_ids=torch.ones(1, 5, dtype=torch.int64), attention_mask=torch.ones(1, 6, dtype=torch.int64))


def test_an_artifact_without_a_cache_does_not_generate() -> None:
    plain = sparc.compile(torch.nn.Linear(4, 4), (torch.ones(1, 4),), recipe="dense", measure=False)
    with pytest.raises(ArtifactError, match="SPARC513"):
        plain.generate(torch.ones(1, 2, dtype=torch.int64))
    with pytest.raises(ArtifactError, match="SPARC513"):
        as_transformers(plain)


def test_an_unknown_task() -> None:
    with pytest.raises(CaptureError, match="SPARC113"):
        sparc.compile(torch.nn.Linear(4, 4), task="text-genration")


def test_calibration_on_what_a_tokenizer_returns() -> None:
    data = [prompts(2, length) for length in (5, 7, 9, 6)]
    artifact = sparc.compile(decoder("llama"), task="text-generation", recipe="w4", data=data, measure=False)
    assert artifact.ledger.summary.data == "held out"
    assert artifact.generate(**prompts(), max_new_tokens=3).shape == (2, 9)
