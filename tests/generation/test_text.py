"""Tokens as text: tokenizers beside a model, chat templates, and the commands that use them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import sparc
from sparc.artifact import Artifact
from sparc.cli import run
from sparc.diag import ArtifactError
from sparc.generation.text import attach_tokenizer, chat_prompt, growing_text, read_tokenizer
from tests.generation.decoders import decoder

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


def byte_tokenizer() -> Tokenizer:
    """A token for every byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder of a tiny model that speaks bytes."""
    from transformers import PreTrainedTokenizerFast

    place = tmp_path_factory.mktemp("models") / "hf"
    decoder("llama", vocab_size=256).save_pretrained(place)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer())
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def saved(folder: Path) -> Path:
    """The artifact that the command line makes of it."""
    place = folder.parent / "out"
    assert run(["compile", str(folder), "--recipe", "w8", "--genai", "--no-measure", "-o", str(place)]) == 0
    return place


def test_the_command_streams_what_generate_returns(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["run", str(saved), "--prompt", "Sparse", "--max-new-tokens", "12"]) == 0
    printed = capsys.readouterr()
    artifact = sparc.load(saved)
    tokenizer = read_tokenizer(artifact)
    ids = torch.tensor([tokenizer.encode("Sparse").ids])
    expected = tokenizer.decode(artifact.generate(ids, max_new_tokens=12)[0, 6:].tolist())
    assert printed.out == expected + "\n"
    assert "12 new" in printed.err


def test_an_artifact_is_compared_with_its_model(saved: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["compare", str(saved), str(folder), "--task", "text-generation", "--json"]
    assert run([*arguments, "--tolerance", "0.05"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {row["name"] for row in found["outputs"]} >= {"logits", "present.0.key"}
    assert run([*arguments, "--tolerance", "1e-7"]) == 1
    capsys.readouterr()
    assert run(["bench", str(saved), "--vs", str(folder), "--task", "text-generation", "--calls", "5", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["timings"]) == 2


def test_the_command_as_json(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["run", str(saved), "--chat", "-p", "Hi", "--max-new-tokens", "3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["prompt_tokens"] == len("<user>Hi<a>")
    assert found["new_tokens"] == 3
    assert found["decode_tokens_per_second"] > 0


def test_ctrl_c_keeps_what_was_said(
    saved: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> Iterator[torch.Tensor]:
        yield torch.tensor([40])
        raise KeyboardInterrupt

    monkeypatch.setattr(Artifact, "stream", interrupted)
    assert run(["run", str(saved), "--prompt", "Sparse"]) == 130
    assert capsys.readouterr().out == byte_tokenizer().decode([40]) + "\n"


def test_genai_settings_describe_the_model(saved: Path) -> None:
    found = json.loads((saved / "genai_config.json").read_text())
    assert found["model"]["context_length"] == 64
    assert found["model"]["vocab_size"] == 256
    shape = {key: found["model"]["decoder"][key] for key in ("head_size", "num_key_value_heads", "num_hidden_layers")}
    assert shape == {"head_size": 8, "num_key_value_heads": 2, "num_hidden_layers": 2}
    assert found["model"]["decoder"]["filename"] == "model.onnx"


def test_genai_generates_the_same_tokens(saved: Path) -> None:
    import onnxruntime_genai as genai

    model = genai.Model(str(saved))
    prompt = read_tokenizer(sparc.load(saved)).encode("Sparse").ids
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=len(prompt) + 10, min_length=len(prompt) + 10, do_sample=False)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(prompt)
    for _ in range(10):
        generator.generate_next_token()
    expected = sparc.load(saved).generate(torch.tensor([prompt]), max_new_tokens=10, eos_token_id=[])
    assert list(generator.get_sequence(0)) == expected[0].tolist()


def test_genai_needs_an_onnx_target(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["compile", str(folder), "-r", "dense", "-t", "reference", "--genai", "--no-measure"]
    assert run([*arguments, "-o", str(tmp_path / "out")]) == 1
    assert "SPARC509" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_artifact_without_a_tokenizer(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    artifact = sparc.load(saved)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        artifact.attachments.pop(name, None)
    artifact.save(tmp_path / "out")
    assert run(["run", str(tmp_path / "out"), "--prompt", "Sparse"]) == 1
    assert "SPARC513" in capsys.readouterr().err
    with pytest.raises(ArtifactError, match=r"SPARC513.*chat template"):
        chat_prompt(artifact, [])


def test_a_tokenizer_can_be_attached(saved: Path) -> None:
    artifact = sparc.load(saved)
    artifact.attachments.clear()
    attach_tokenizer(artifact, byte_tokenizer())
    assert read_tokenizer(artifact).decode(read_tokenizer(artifact).encode("äx").ids) == "äx"
    with pytest.raises(ArtifactError, match="SPARC513"):
        attach_tokenizer(artifact, object())
    artifact.attachments["tokenizer.json"] = b"{}"
    with pytest.raises(ArtifactError, match="SPARC513"):
        read_tokenizer(artifact)


def test_a_chat_template_cannot_reach_python(saved: Path) -> None:
    artifact = sparc.load(saved)
    artifact.attachments["chat_template.jinja"] = b"{{ messages.__class__.__mro__ }}"
    with pytest.raises(ArtifactError, match="SPARC513"):
        chat_prompt(artifact, [])


@given(st.text(max_size=20))
def test_growing_text_joins_to_the_whole(text: str) -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode(text).ids
    pieces = list(growing_text(tokenizer, ids))
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece or "\ufffd" in text for piece in pieces)


def test_growing_text_ends_with_what_is_incomplete() -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode("aä").ids[:-1]
    assert "".join(growing_text(tokenizer, ids)) == "a\ufffd"
