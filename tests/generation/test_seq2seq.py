"""Encoder-decoders: two entries over one store compute, and generate, what the model does."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import sparc
from sparc import evidence
from sparc.artifact import Artifact
from sparc.cache import DECODER, ENCODER
from sparc.diag import ArtifactError, CaptureError, LoweringError
from sparc.generation.adapter import as_transformers
from sparc.generation.genai import genai_config
from sparc.generation.generate import Ending, stream_tokens
from sparc.generation.sampling import Sampling
from sparc.generation.session import ExplicitCache, Session
from sparc.generation.static_cache import StaticCache
from sparc.generation.task import prepare_task
from sparc.program import Program
from sparc.serialize.cache import cache_from_json, cache_to_json
from sparc.verify import relative_error
from tests.generation.decoders import decoder
from tests.generation.encoder_decoders import (
    CONFIGS,
    START,
    VOCABULARY,
    captured,
    encoder_decoder,
    sources,
    targets,
)

NAMES = [name if name in ("t5", "bart") else pytest.param(name, marks=pytest.mark.slow) for name in CONFIGS]


def compiled(model: Any, target: str = "reference", recipe: str = "dense", **options: Any) -> Artifact:
    return sparc.compile(
        model, task="text-generation", recipe=recipe, target=target, **{"measure": False, **options}
    )  # fmt: skip


@cache
def served(name: str, target: str) -> tuple[Any, Artifact]:
    """A tiny encoder-decoder, and what became of it."""
    model = encoder_decoder(name)
    return model, compiled(model, target)


@pytest.fixture(scope="module")
def artifact() -> Artifact:
    return served("bart", "onnx")[1]


# capture --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", NAMES)
def test_logits_at_other_sizes(name: str) -> None:
    model, program = captured(name)
    for batch, length, past, count in ((1, 1, 0, 1), (3, 9, 4, 2), (1, 20, 1, 1)):
        given = sources(batch, length)
        mask, tokens = given["attention_mask"], targets(batch, past + count)
        cross = program.run(entry=ENCODER, **given)["cross"]
        more: dict[str, Any] = {"encoder_attention_mask": mask, "cross": cross, "entry": DECODER}
        before = program.run(input_ids=tokens[:, :past], **more)["present"] if past else None
        found = program.run(input_ids=tokens[:, past:], past_key_values=before, **more)["logits"]
        with torch.no_grad():
            expected = model(**given, decoder_input_ids=tokens).logits[:, past:]
        assert relative_error(expected, found) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_every_weight_is_stored_once_under_its_own_name(name: str) -> None:
    model, program = captured(name)
    held = {name: tensor for name, tensor in program.weights.items() if tensor.numel()}
    assert len({tensor.data_ptr() for tensor in held.values()}) == len(held)
    assert held.keys() <= {*dict(model.named_parameters()), *dict(model.named_buffers())}


def test_both_entries_read_the_embedding() -> None:
    model, program = captured("t5")
    assert program.weights.nbytes == sum(each.nbytes for each in model.parameters())
    for entry in program.entries.values():
        assert entry.graph.find_nodes(op="get_attr", target="shared.weight")


def test_the_encoder_holds_nothing_of_the_decoder_but_what_makes_keys_and_values() -> None:
    _, program = captured("bart")
    used = {str(node.target) for node in program.entries[ENCODER].graph.find_nodes(op="get_attr")}
    decoders = {name for name in used if ".decoder." in name and "lifted_tensor" not in name}
    assert decoders == {
        f"model.decoder.layers.{layer}.encoder_attn.{kind}_proj.{part}"
        for layer in (0, 1) for kind in "kv" for part in ("weight", "bias")
    }  # fmt: skip


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: _whisper(), "reads input_features"),
        (lambda: encoder_decoder("t5").encoder, "no language model"),
        (lambda: _without_start(), "no decoder_start_token_id"),
    ],
)
def test_other_models_are_refused(make: Any, why: str) -> None:
    with pytest.raises(CaptureError, match=f"SPARC112.*{why}"):
        prepare_task("text-generation", make(), None)


def _whisper() -> Any:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    sizes = {"d_model": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "encoder_attention_heads": 2,
             "decoder_attention_heads": 2, "encoder_layers": 1, "decoder_layers": 1}  # fmt: skip
    return WhisperForConditionalGeneration(WhisperConfig(vocab_size=99, pad_token_id=0, eos_token_id=1, **sizes))


def _without_start() -> Any:
    model = encoder_decoder("t5")
    for settings in (model.config, model.generation_config):
        settings.decoder_start_token_id = settings.bos_token_id = None
    return model


# generation -----------------------------------------------------------------------------------------------------------
_MORE = [("t5", "onnx"), ("mt5", "reference")]


@pytest.mark.parametrize(
    ("name", "target"),
    [("t5", "reference"), ("bart", "onnx"), *(pytest.param(*each, marks=pytest.mark.slow) for each in _MORE)],
)
def test_greedy_tokens_are_the_models(name: str, target: str) -> None:
    model, artifact = served(name, target)
    expected = model.generate(**sources(), max_new_tokens=10, do_sample=False)
    assert len(expected.unique()) >= 5  # the source decides
    assert torch.equal(artifact.generate(**sources(), max_new_tokens=10, do_sample=False), expected)


def test_tokens_that_settings_prescribe(artifact: Artifact) -> None:
    found = artifact.generate(**sources(), max_new_tokens=6)
    assert found[:, -1].tolist() == [2, 2, 2]  # forced_eos_token_id of BART's configuration
    model = encoder_decoder("bart", forced_eos_token_id=None, encoder_layers=1, decoder_layers=1)
    model.generation_config.forced_bos_token_id = 7
    forced = compiled(model).generate(**sources(), max_new_tokens=6)
    assert forced[:, 1].tolist() == [7, 7, 7]
    assert torch.equal(forced, model.generate(**sources(), max_new_tokens=6, do_sample=False))


def test_padding_of_the_source_changes_nothing(artifact: Artifact) -> None:
    padded = artifact.generate(**sources(), max_new_tokens=8)
    alone = sources()["input_ids"][1:2, :-3]
    assert torch.equal(artifact.generate(alone, max_new_tokens=8), padded[1:2])
    odd = sources()
    odd["input_ids"][1, -3:] = -1
    assert torch.equal(artifact.generate(**odd, max_new_tokens=8), padded)


def test_a_session_step_by_step() -> None:
    model, artifact = served("bart", "onnx")
    given, tokens = sources(), targets(3, 6)
    session = artifact.session(**given, length=8)
    assert session.batch == 3
    found = [session.feed(tokens[:, :3]), *(session.feed(tokens[:, place : place + 1]) for place in range(3, 6))]
    with torch.no_grad():
        expected = model(**given, decoder_input_ids=tokens).logits[:, 2:]
    assert relative_error(expected, torch.stack(found, dim=1)) < 1e-5
    session.cut(4)
    torch.testing.assert_close(session.feed(tokens[:, 4:5]), found[2])


def test_a_session_goes_on(artifact: Artifact) -> None:
    whole = artifact.generate(**sources(), max_new_tokens=5)
    session = artifact.session(**sources())
    first = artifact.generate(torch.full((3, 1), START), max_new_tokens=4, session=session)
    assert torch.equal(first, whole[:, :5])
    again = artifact.generate(targets(3, 2), max_new_tokens=4, session=session)
    other = artifact.session(**sources())
    expected = artifact.generate(torch.cat([first, targets(3, 2)], dim=1), max_new_tokens=4, session=other)
    assert torch.equal(again, expected[:, 5:])


def test_a_source_is_moved_to_the_device_once() -> None:
    entry = captured("bart")[1].entries[DECODER]
    assert entry.cache is not None
    calls: list[list[Any]] = []

    def run(given: Any) -> list[Any]:
        calls.append(list(given))
        return [torch.zeros(2, 1, VOCABULARY)]

    source = {name: torch.zeros(2, 4, 6, 8) for name in entry.cache.source}
    session = Session(entry, StaticCache(entry, run, 2, 8, "meta"), 2, 8, source)
    session.feed(targets(2, 1))
    session.feed(targets(2, 1))
    first, second = (dict(zip(entry.signature.input_names, each, strict=False)) for each in calls)
    assert all(first[name] is second[name] and first[name].is_meta for name in source)
    assert first["input_ids"] is not second["input_ids"]


def test_the_cache_lies_in_buffers() -> None:
    assert isinstance(served("t5", "reference")[1].session(**sources())._run, StaticCache)


def test_nothing_is_longer_than_the_model_knows(artifact: Artifact) -> None:
    assert artifact.generate(targets(1, 64), max_new_tokens=2).shape == (1, 3)
    with pytest.raises(ArtifactError, match=r"SPARC506.*source is from 1 to 64"):
        artifact.generate(targets(1, 65))
    with pytest.raises(ArtifactError, match="SPARC511"):
        artifact.generate(targets(1, 5), max_new_tokens=65)
    with pytest.raises(ArtifactError, match="SPARC511"):
        artifact.session(input_ids=targets(1, 5), length=65)


def test_relative_positions_have_no_limit() -> None:
    model, artifact = served("t5", "reference")
    assert model.config.relative_attention_max_distance == 128
    given = targets(1, 200)
    expected = model.generate(given, max_new_tokens=4, do_sample=False)
    assert torch.equal(artifact.generate(given, max_new_tokens=4), expected)


@pytest.mark.parametrize(
    "given",
    [
        {"input_ids": torch.zeros(2, 3)},
        {"input_ids": [[1, 2]]},
        {"input_ids": None},
        {"input_ids": torch.ones(1, 0, dtype=torch.int64)},
        {"input_ids": torch.full((1, 2), VOCABULARY)},
        {"input_ids": torch.ones(2, 2, dtype=torch.int64), "attention_mask": torch.tensor([[1, 1], [0, 0]])},
        {"input_ids": torch.ones(2, 2, dtype=torch.int64), "attention_mask": torch.ones(2, 3)},
    ],
)
def test_bad_sources(artifact: Artifact, given: dict[str, Any]) -> None:
    for ask in (artifact.generate, artifact.session):
        with pytest.raises(ArtifactError, match="SPARC512"):
            ask(**given)


def test_a_decoder_alone_reads_no_source() -> None:
    with pytest.raises(ArtifactError, match=r"SPARC512.*no encoder"):
        compiled(decoder("gpt2", n_layer=1)).session(input_ids=targets(1, 3))


def test_what_is_missing_is_said(artifact: Artifact) -> None:
    parts = artifact.program, artifact.ledger, artifact.diagnostics, artifact.emission
    with pytest.raises(ArtifactError, match=r"SPARC513.*decoder_start_token_id"):
        Artifact(*parts).generate(**sources())
    alone = Program(artifact.program.weights, {DECODER: artifact.program.entries[DECODER]})
    with pytest.raises(ArtifactError, match=r"SPARC513.*'encoder'"):
        Artifact(alone, *parts[1:], attachments=artifact.attachments).generate(**sources())
    with pytest.raises(LoweringError, match=r"SPARC509.*onnxruntime-genai"):
        genai_config(artifact)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_return_sequences": 2, "num_beams": 2}],
                         ids=["greedy", "beams", "sequences"])  # fmt: skip
def test_transformers_generates_with_it(options: dict[str, Any]) -> None:
    model, artifact = served("t5", "reference")
    expected = model.generate(**sources(), max_new_tokens=8, do_sample=False, **options)
    adapted = as_transformers(artifact)
    assert torch.equal(adapted.generate(**sources(), max_new_tokens=8, do_sample=False, **options), expected)


def test_logits_under_the_interface_of_transformers() -> None:
    model, artifact = served("t5", "reference")
    for given in (sources(), {"input_ids": targets(2, 4)}):
        tokens = targets(given["input_ids"].shape[0], 3)
        with torch.no_grad():
            expected = model(**given, decoder_input_ids=tokens).logits
        found = as_transformers(artifact)(**given, decoder_input_ids=tokens).logits
        assert relative_error(expected, found) < 1e-5


@pytest.mark.parametrize("source", [["missing"], ["cross.0.key"] * 2, ["past_key_values.0.key"], [3], "cross.0.key"])
def test_a_stored_source_names_inputs_of_its_own(source: Any) -> None:
    entry = captured("bart")[1].entries[DECODER]
    assert entry.cache is not None
    described = cache_to_json(entry.cache)
    assert cache_from_json(described, entry) == entry.cache
    with pytest.raises(ArtifactError, match="SPARC503"):
        cache_from_json({**described, "source": source}, entry)


# compilation ----------------------------------------------------------------------------------------------------------
@cache
def in_eight_bits() -> Artifact:
    data = [{**sources(2, 6 + index), "labels": targets(2, 4 + index)} for index in range(4)]
    return compiled(encoder_decoder("t5"), "onnx", "w8", data=data)


def test_eight_bits_generate_what_the_program_computes() -> None:
    artifact = in_eight_bits()
    program, entry = artifact.program, artifact.program.entries[DECODER]
    source = {
        **dict(zip(program.main.signature.output_names, program.run_flat(list(sources().values())), strict=True)),
        "encoder_attention_mask": sources()["attention_mask"],
    }
    run = ExplicitCache(entry, 3, lambda tensors: program.run_flat(list(tensors), entry=DECODER))
    begin = torch.full((3, 1), START)
    chosen = stream_tokens(Session(entry, run, 3, 9, source), begin, None, Sampling(), Ending(8))
    expected = torch.cat([begin, torch.stack(list(chosen), dim=1)], dim=1)
    assert torch.equal(artifact.generate(**sources(), max_new_tokens=8), expected)


def test_a_weight_of_both_entries_is_encoded_once(tmp_path: Path) -> None:
    artifact = in_eight_bits()
    shared = {name for name in artifact.program.weights if name.startswith("shared.weight")}
    assert shared == {"shared.weight_codes", "shared.weight_scale"}
    assert [row.encoding for row in artifact.ledger.sites if row.weight == "shared.weight"] == ["IntGrid(bits=8)"]
    artifact.save(tmp_path / "out")
    assert {"model.onnx", "decoder.onnx"} <= {path.name for path in (tmp_path / "out").iterdir()}
    weights = (tmp_path / "out" / "weights.safetensors").stat().st_size
    assert weights < 0.5 * sum(each.nbytes for each in encoder_decoder("t5").parameters())
    loaded = sparc.load(tmp_path / "out")
    assert loaded.program.entries[DECODER].cache == artifact.program.entries[DECODER].cache
    expected = artifact.generate(**sources(), max_new_tokens=5)
    assert torch.equal(loaded.generate(**sources(), max_new_tokens=5), expected)


def test_errors_and_parity_are_of_each_entry() -> None:
    summary = in_eight_bits().ledger.summary
    names = {"encoder: cache, worst of 4", "decoder: logits", "decoder: cache, worst of 4"}
    assert summary.data == "held out"
    assert summary.errors.keys() == summary.parity.keys() == names
    assert all(figures["relative error"] > 0 for figures in summary.errors.values())


def test_every_entry_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, list[Tensor]] = {}

    def note(ours: Any, theirs: Any, model: Any, named: Any, tensors: list[Tensor], **given: Any) -> list[Any]:
        seen[given["label"]] = tensors
        assert [each.shape for each in ours(tensors)] == [each.shape for each in theirs(given["dense_tensors"])]
        model(**named)
        return []

    monkeypatch.setattr(evidence, "latencies", note)
    compiled(encoder_decoder("bart", encoder_layers=1, decoder_layers=1), measure=True)
    assert {label: tensors[0].shape for label, tensors in seen.items()} == {
        "a source of 63 tokens": (1, 63),
        "one token after 63": (1, 1),
    }
