"""Models in GGUF files: the same logits as transformers' model of the decoded weights, and compiled as they are."""

import dataclasses

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

import sparc
from sparc.checkpoint.base import Checkpoint
from sparc.cli import run
from sparc.diag import CaptureError
from sparc.encoding.int_grid import IntGrid
from tests.checkpoint.gguf_files import CLASSES, VOCABULARY, tiny, weight_decodes, write

IDS = torch.randint(0, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids).logits


def filled(model, state):
    model.load_state_dict(state, strict=False)
    model.tie_weights()
    return model


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("architecture", CLASSES)
def test_models_are_those_of_transformers(architecture, tied, tmp_path):
    model = tiny(architecture, tied=tied, layers=2)
    state = write(tmp_path / "model.gguf", model, architecture)
    checkpoint = sparc.read_checkpoint(tmp_path / "model.gguf")
    expected = filled(model, state)
    assert type(checkpoint.model) is type(model)
    found = checkpoint.model.state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.state_dict().items())
    assert torch.equal(logits(checkpoint.model), logits(expected))
    assert len(checkpoint.grids) == 2 * 7 + (1 if tied else 2)


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q4_K, Kind.Q6_K, Kind.Q8_0, Kind.F16, Kind.BF16, Kind.F32])
def test_every_matrix_of_a_format(kind, tmp_path):
    model = tiny()
    state = write(tmp_path / "model.gguf", model, kind=kind, embedding=Kind.F16 if kind == Kind.F16 else kind)
    checkpoint = sparc.read_checkpoint(tmp_path / "model.gguf")
    assert torch.equal(logits(checkpoint.model), logits(filled(model, state)))
    assert len(checkpoint.grids) == (0 if kind == Kind.F32 else 8)


@pytest.mark.parametrize("target", ["reference", "onnx"])
@pytest.mark.parametrize("kind", [Kind.Q4_1, Kind.Q6_K], ids=lambda kind: kind.name)
def test_keep_compiles_the_codes(kind, target, tmp_path):
    model = tiny()
    write(tmp_path / "model.gguf", model, kind=kind)
    checkpoint = sparc.read_checkpoint(tmp_path / "model.gguf")
    artifact = sparc.compile(
        checkpoint, {"input_ids": IDS}, recipe="keep", target=target, measure=False,
        dynamic={"input_ids": {0: "batch", 1: "seq"}},
    )  # fmt: skip
    assert len(weight_decodes(artifact.program)) == 8
    assert artifact.program.weights.nbytes < 0.32 * sum(each.nbytes for each in checkpoint.model.parameters())
    for name, grid in checkpoint.grids.items():
        for part, tensor in grid.tensors.items():
            stored = artifact.program.weights[f"{name}_{part}"]
            assert stored.dtype == tensor.dtype
            assert torch.equal(stored, tensor)
    found = artifact(input_ids=IDS)["logits"]
    expected = logits(checkpoint.model)
    if target == "reference":
        assert torch.equal(found, expected)
    assert (found - expected).norm() < 1e-4 * expected.norm()


def test_a_compiled_file_is_saved_and_loaded(tmp_path):
    write(tmp_path / "model.gguf", tiny())
    target = ["--target", "onnx", "--no-measure"]
    assert run(["compile", str(tmp_path / "model.gguf"), "-o", str(tmp_path / "out"), *target]) == 0
    artifact, checkpoint = sparc.load(tmp_path / "out"), sparc.read_checkpoint(tmp_path / "model.gguf")
    found = artifact(input_ids=IDS, attention_mask=torch.ones_like(IDS))["logits"]
    expected = logits(checkpoint.model)
    assert (found - expected).norm() < 1e-4 * expected.norm()
    specs = {str(node.args[1]) for node in weight_decodes(artifact.program)}
    assert specs == {str(grid.spec) for grid in checkpoint.grids.values()}


def test_other_commands_take_a_file(tmp_path, capsys):
    write(tmp_path / "model.gguf", tiny())
    assert run(["inspect", str(tmp_path / "model.gguf"), "--json"]) == 0
    assert "model.layers.0.mlp.down_proj" in capsys.readouterr().out
    assert run(["compile", str(tmp_path / "model.gguf"), "--dry-run", "--json"]) == 0
    assert "encode" in capsys.readouterr().out


def test_another_recipe_rounds_again(tmp_path):
    write(tmp_path / "model.gguf", tiny(), kind=Kind.Q4_0)
    checkpoint = sparc.read_checkpoint(tmp_path / "model.gguf")
    artifact = sparc.compile(checkpoint, {"input_ids": IDS}, recipe="w8", target="reference", measure=False)
    specs = {str(node.args[1]) for node in weight_decodes(artifact.program)}
    assert specs == {str(IntGrid(8))}


class Wrapper(torch.nn.Module):
    def __init__(self, causal):
        super().__init__()
        self.inner, self.head = causal.model, causal.lm_head

    def forward(self, input_ids):
        return self.head(self.inner(input_ids=input_ids, use_cache=False).last_hidden_state)


def test_grids_follow_into_another_module(tmp_path):
    write(tmp_path / "model.gguf", tiny())
    checkpoint = sparc.read_checkpoint(tmp_path / "model.gguf")
    wrapped = checkpoint.with_model(Wrapper(checkpoint.model))
    assert len(wrapped.grids) == len(checkpoint.grids)
    program = sparc.capture(wrapped, {"input_ids": IDS})
    assert sum(program.grid(name) is not None for name in program.weights) == 8
    for name in program.weights:
        grid = program.grid(name)
        if grid is not None:
            assert grid is checkpoint.grids[name.replace("inner.", "model.")]


def test_rotary_factors_divide_the_frequencies(tmp_path):
    factors = np.linspace(1, 8, 32, dtype=np.float32)
    model = tiny()
    state = write(tmp_path / "model.gguf", model, extra={"rope_freqs.weight": factors})
    plain = logits(filled(model, state))
    model.model.rotary_emb.inv_freq.div_(torch.from_numpy(factors))
    expected = logits(model)
    assert not torch.allclose(plain, expected)
    assert torch.equal(logits(sparc.read_checkpoint(tmp_path / "model.gguf").model), expected)


def test_linear_rotary_scaling(tmp_path):
    model = tiny(rope_parameters={"rope_type": "linear", "rope_theta": 5e3, "factor": 4.0})
    state = write(tmp_path / "model.gguf", model, tokens=lambda writer: (
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR), writer.add_rope_scaling_factor(4.0)))  # fmt: skip
    expected = logits(filled(model, state))
    assert torch.equal(logits(sparc.read_checkpoint(tmp_path / "model.gguf").model), expected)


# refusals -------------------------------------------------------------------------------------------------------------
def refused(path, **changes):
    with pytest.raises(CaptureError) as caught:
        sparc.read_checkpoint(path)
    return caught.value


class Changed:
    """A model with another config or other weights than it has."""

    def __init__(self, model, state=None, **changes):
        self.config = model.config
        for name, value in changes.items():
            setattr(self.config, name, value)
        self.state = model.state_dict() if state is None else state

    def state_dict(self):
        return self.state


LYING_CONFIGS = {
    "more layers": {"num_hidden_layers": 2},
    "a billion layers": {"num_hidden_layers": 1_000_000_000},
    "another width": {"hidden_size": 512},
    "a huge width": {"hidden_size": 1 << 30},
    "another inner width": {"intermediate_size": 128},
    "more heads of keys": {"num_key_value_heads": 4},
}


@pytest.mark.parametrize("case", LYING_CONFIGS)
def test_configs_that_do_not_fit_are_refused(case, tmp_path):
    model = tiny()
    write(tmp_path / "model.gguf", Changed(model, **LYING_CONFIGS[case]))
    assert refused(tmp_path / "model.gguf").code == "SPARC119"


def test_weights_of_another_architecture_are_refused(tmp_path):
    write(tmp_path / "model.gguf", tiny("qwen3"), "llama")
    error = refused(tmp_path / "model.gguf")
    assert error.code == "SPARC119"
    assert "q_norm.weight' is left over" in str(error)


def test_missing_and_other_weights_are_named(tmp_path):
    model = tiny()
    state = dict(model.state_dict())
    del state["model.norm.weight"]
    state["model.layers.0.input_layernorm.weight"] = torch.ones(64)
    write(tmp_path / "model.gguf", Changed(model, state))
    error = refused(tmp_path / "model.gguf")
    assert error.code == "SPARC119"
    assert "'model.norm.weight' is missing" in str(error)
    assert "has the shape [64], not [256]" in str(error)


def test_names_without_a_place_are_refused(tmp_path):
    write(tmp_path / "model.gguf", tiny(), extra={"blk.0.ffn_gate_exps.weight": np.ones((2, 8, 32), np.float32)})
    assert refused(tmp_path / "model.gguf").code == "SPARC119"


def entry(name, value):
    return lambda writer: writer.add_key_value(name, value, gguf.GGUFValueType.get_type(value))


UNKNOWN = {
    "experts": entry("llama.expert_count", 8),
    "yarn": entry("llama.rope.scaling.type", "yarn"),
    "rotated in part": entry("llama.rope.dimension_count", 32),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_what_is_not_known_is_refused(case, tmp_path):
    write(tmp_path / "model.gguf", tiny(), tokens=UNKNOWN[case])
    assert refused(tmp_path / "model.gguf").code == "SPARC118"


def test_unknown_architectures_are_refused(tmp_path):
    write(tmp_path / "model.gguf", tiny(), "mamba")
    error = refused(tmp_path / "model.gguf")
    assert error.code == "SPARC118"
    assert "'mamba'" in str(error)
    assert "llama, qwen2, qwen3, gemma" in str(error)


def test_paths_that_are_no_checkpoint(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    assert refused(tmp_path / "missing.gguf").code == "SPARC110"
    assert refused(tmp_path / "notes.txt").code == "SPARC118"


def test_notes_become_remarks():
    model = torch.nn.Linear(4, 4)
    checkpoint = Checkpoint(model, {}, "test", notes=("a note",))
    artifact = sparc.compile(checkpoint, (torch.ones(2, 4),), recipe="keep", target="reference", measure=False)
    assert [each.code.id for each in artifact.diagnostics if each.what == "a note"] == ["SPARC120"]
    assert dataclasses.replace(checkpoint, notes=()).notes == ()
