"""Checkpoints for vLLM: what compressed-tensors itself decompresses is what the artifact decodes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import sparc
from sparc.artifact import Artifact
from sparc.checkpoint.export import export_checkpoint
from sparc.diag import ArtifactError, LoweringError
from sparc.encoding.int_grid import IntGrid
from sparc.encoding.microscaling import MXFP4
from sparc.passes.encode import Encode
from sparc.passes.round import Round
from tests.generation.decoders import decoder

GRIDS = {
    "channel": IntGrid(8),
    "int4 groups": IntGrid(4, group=16),
    "int4 groups with zero points": IntGrid(4, group=16, symmetric=False),
    "int8 channel with zero points": IntGrid(8, symmetric=False),
    "half scales": IntGrid(4, group=8, scale_dtype="float16"),
}


def compiled(spec: Any, **changes: Any) -> Artifact:
    model = decoder("llama", **changes)
    return sparc.compile(
        model, task="text-generation", recipe=[Round(spec), Encode()], target="reference", measure=False
    )


def decompressed(folder: Path) -> dict[str, Tensor]:
    """The folder's weights, by compressed-tensors' own code."""
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationScheme

    state = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    for group in config["config_groups"].values():
        scheme = QuantizationScheme(**group)
        for layer in group["targets"]:
            parts = {
                name.removeprefix(f"{layer}."): state.pop(name) for name in list(state) if name.startswith(f"{layer}.")
            }
            state[f"{layer}.weight"] = PackedQuantizationCompressor.decompress(parts, scheme)["weight"]
    return state


@pytest.mark.parametrize("spec", GRIDS.values(), ids=GRIDS)
def test_compressed_tensors_reads_the_same_weights(spec: IntGrid, tmp_path: Path) -> None:
    artifact = compiled(spec)
    exported = export_checkpoint(artifact, tmp_path / "out")
    assert len(exported.packed) == 15  # seven in each of two layers, and the head
    assert exported.dense == {"model.embed_tokens": "it is no linear layer's alone"}
    found = decompressed(tmp_path / "out")
    model = decoder("llama")
    model.load_state_dict({name: tensor.float() for name, tensor in found.items()})
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        expected = artifact(input_ids=ids)["logits"]
        rtol = 1e-5 if spec.scale_dtype == "float32" else 1e-2  # compressed-tensors multiplies in the scales' dtype
        torch.testing.assert_close(model(ids).logits, expected, rtol=rtol, atol=rtol / 10)


def test_what_the_format_lacks_is_written_as_floats(tmp_path: Path) -> None:
    for index, spec in enumerate(
        (MXFP4(), IntGrid(4, group=16, symmetric=False, zero="minimum"), IntGrid(3, group=16))
    ):
        artifact = compiled(spec)
        exported = export_checkpoint(artifact, tmp_path / str(index))
        assert not exported.packed
        assert len(exported.dense) == 16
        assert "quantization_config" not in json.loads((tmp_path / str(index) / "config.json").read_text())
        model = decoder("llama")
        model.load_state_dict(load_file(tmp_path / str(index) / "model.safetensors"))
        ids = torch.arange(5, 15)[None]
        torch.testing.assert_close(model(ids).logits, artifact(input_ids=ids)["logits"], rtol=1e-4, atol=1e-5)


def test_a_tied_head_is_written_once(tmp_path: Path) -> None:
    exported = export_checkpoint(compiled(IntGrid(8), tie_word_embeddings=True), tmp_path / "out")
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    assert "model.embed_tokens" in exported.dense


def test_the_same_bytes_every_time(tmp_path: Path) -> None:
    artifact = compiled(IntGrid(8))
    for name in ("a", "b"):
        export_checkpoint(artifact, tmp_path / name)
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_moved_weights_are_refused(tmp_path: Path) -> None:
    exact = sparc.compile(decoder("llama"), task="text-generation", recipe="exact", target="reference", measure=False)
    with pytest.raises(LoweringError, match=r"SPARC509.*layernorm"):
        export_checkpoint(exact, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_models_and_taken_places_are_refused(tmp_path: Path) -> None:
    plain = sparc.compile(torch.nn.Linear(4, 4), (torch.ones(1, 4),), recipe="dense", measure=False)
    with pytest.raises(LoweringError, match=r"SPARC509.*config.json"):
        export_checkpoint(plain, tmp_path / "out")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    with pytest.raises(ArtifactError, match="SPARC505"):
        export_checkpoint(compiled(IntGrid(8)), tmp_path / "taken")
