"""GPTQ, AWQ, compressed-tensors and FP8 folders: codes, scales and zero points as stored, values as in their tools."""

import json

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import load_file

import sparc
from sparc.checkpoint.build import GatheredLinear
from sparc.cli import run
from sparc.encoding.float8 import Float8
from sparc.encoding.int_grid import IntGrid
from sparc.encoding.microscaling import MXFP4, NVFP4
from tests.checkpoint.folders import (
    AWQ,
    GPTQ,
    IDS,
    Q,
    awq,
    gptq,
    integers,
    logits,
    pack,
    refused,
    shuffled,
    write_folder,
)
from tests.checkpoint.gguf_files import weight_decodes


def check(folder, model, spec):
    """The folder holds this model, with its seven layers on grids of this spec."""
    checkpoint = sparc.read_checkpoint(folder)
    found = checkpoint.model.state_dict()
    for name, value in model.state_dict().items():
        order = found.get(name.replace(".weight", ".order"))
        assert torch.equal(found[name], value if order is None else value[:, order]), name
    specs = {str(grid.spec) for name, grid in checkpoint.grids.items() if "proj" in name}
    assert specs == {str(spec)}
    assert sum("proj" in name for name in checkpoint.grids) == 7
    return checkpoint


# GPTQ -----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("version", [1, 2])
def test_gptq(bits, version, tmp_path):
    form = "gptq" if version == 1 else "gptq_v2"
    model = write_folder(tmp_path / "m", gptq(bits, version=version), {**GPTQ, "bits": bits, "checkpoint_format": form})
    checkpoint = check(tmp_path / "m", model, IntGrid(bits, 32, symmetric=False, scale_dtype="float16"))
    assert torch.equal(logits(checkpoint.model), logits(model))


def test_gptq_keeps_scales_and_zero_points(tmp_path):
    write_folder(tmp_path / "m", gptq(), GPTQ)
    stored = load_file(tmp_path / "m/model.safetensors")
    grid = sparc.read_checkpoint(tmp_path / "m").grids[f"{Q}.weight"]
    assert torch.equal(grid.tensors["scale"], stored[f"{Q}.scales"].T)
    zeros = [(word >> 4 * place & 15) + 1 & 15 for word in stored[f"{Q}.qzeros"][0].tolist() for place in range(8)]
    assert grid.tensors["zero"][:, 0].tolist() == zeros


def test_gptq_with_middle_zero_points_is_symmetric(tmp_path):
    model = write_folder(tmp_path / "m", gptq(symmetric=True, dtype=torch.bfloat16), GPTQ)
    check(tmp_path / "m", model, IntGrid(4, 32, scale_dtype="bfloat16"))


def test_gptq_without_g_idx(tmp_path):
    model = write_folder(tmp_path / "m", gptq(), GPTQ, remove=("g_idx",))
    check(tmp_path / "m", model, IntGrid(4, 32, symmetric=False, scale_dtype="float16"))


def test_gptq_with_one_scale_per_row(tmp_path):
    def compress(name, weight):
        return gptq(group=weight.shape[1])(name, weight)

    model = write_folder(tmp_path / "m", compress, GPTQ)
    check(tmp_path / "m", model, IntGrid(4, symmetric=False, scale_dtype="float16"))


def test_gptq_in_the_order_of_activations(tmp_path):
    model = write_folder(tmp_path / "m", gptq(index=shuffled), {**GPTQ, "desc_act": True})
    checkpoint = check(tmp_path / "m", model, IntGrid(4, 32, symmetric=False, scale_dtype="float16"))
    assert sum(isinstance(each, GatheredLinear) for each in checkpoint.model.modules()) == 7
    assert torch.allclose(logits(checkpoint.model), logits(model), atol=1e-5)
    compiled(checkpoint, "onnx", 7)


def test_gptq_of_uneven_groups_is_refused(tmp_path):
    def uneven(columns):
        return torch.tensor([0] * 33 + [1] * 31 + [2] * (columns - 64))

    write_folder(tmp_path / "m", gptq(index=uneven), GPTQ)
    assert refused(tmp_path / "m").code == "SPARC117"


def test_a_bias_of_zeros_is_left_out_and_another_is_not(tmp_path):
    zeros = {f"{Q}.bias": torch.zeros(64, dtype=torch.float16)}
    model = write_folder(tmp_path / "m", gptq(), GPTQ, more=zeros)
    assert torch.equal(logits(sparc.read_checkpoint(tmp_path / "m").model), logits(model))
    write_folder(tmp_path / "m", gptq(), GPTQ, more={f"{Q}.bias": torch.ones(64, dtype=torch.float16)})
    assert refused(tmp_path / "m").code == "SPARC119"


# AWQ ------------------------------------------------------------------------------------------------------------------
def test_awq(tmp_path):
    model = write_folder(tmp_path / "m", awq, AWQ)
    checkpoint = check(tmp_path / "m", model, IntGrid(4, 32, symmetric=False, scale_dtype="float16"))
    assert torch.equal(logits(checkpoint.model), logits(model))
    assert any("half precision" in note for note in checkpoint.notes)


# compressed-tensors ---------------------------------------------------------------------------------------------------
def ct(form, **weights):
    """A config, and a function that compresses with the package itself."""
    activations = weights.pop("activations", None)
    arguments = QuantizationArgs(**weights)
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments, input_activations=activations, format=form)
    described = {"targets": ["Linear"], "weights": json.loads(arguments.model_dump_json())}
    if activations is not None:
        described["input_activations"] = json.loads(activations.model_dump_json())
    settings = {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": described}}
    compressor = BaseCompressor.get_value_from_registry(form)

    def compress(given):
        parts = compressor.compress(given, scheme)
        values = {name: value.float() if "scale" in name and value.dtype in (torch.float16, torch.bfloat16) else value
                  for name, value in parts.items()}  # fmt: skip
        return parts, compressor.decompress(values, scheme)["weight"].float()

    return settings, compress


def qparams(weight, bits, group, *, symmetric, dtype=torch.bfloat16):
    """Scales, and signed zero points, int8, for compressed-tensors."""
    _, scale, zero, _ = integers(weight, bits, group, symmetric=symmetric, dtype=dtype)
    given = {"weight": weight, "weight_scale": scale.float().to(dtype)}
    if not symmetric:
        given["weight_zero_point"] = (zero - 2 ** (bits - 1)).to(torch.int8)
    return given


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("strategy", ["group", "channel"])
def test_pack_quantized(bits, symmetric, strategy, tmp_path):
    size = {"group_size": 32} if strategy == "group" else {}
    settings, compress = ct("pack-quantized", num_bits=bits, symmetric=symmetric, strategy=strategy, **size)

    def layer(name, weight):
        return compress(qparams(weight, bits, 32 if size else weight.shape[1], symmetric=symmetric))

    model = write_folder(tmp_path / "m", layer, settings, dtype=torch.bfloat16)
    group = 32 if size else "channel"
    check(tmp_path / "m", model, IntGrid(bits, group, symmetric=symmetric, scale_dtype="bfloat16"))


def test_pack_quantized_in_the_order_of_activations(tmp_path):
    settings, compress = ct("pack-quantized", num_bits=4, symmetric=True, strategy="group", group_size=32)

    def layer(name, weight):
        index = shuffled(weight.shape[1])
        order = torch.argsort(index, stable=True)
        back = torch.argsort(order)
        parts, meant = compress(qparams(weight[:, order], 4, 32, symmetric=True))
        codes = sparc_unpack(parts["weight_packed"], 4, weight.shape[1])[:, back]
        return {**parts, "weight_packed": pack(codes, 4), "weight_g_idx": index.int()}, meant[:, back]

    model = write_folder(tmp_path / "m", layer, settings, dtype=torch.bfloat16)
    checkpoint = check(tmp_path / "m", model, IntGrid(4, 32, scale_dtype="bfloat16"))
    assert torch.allclose(logits(checkpoint.model), logits(model), atol=1e-5)


def sparc_unpack(words, bits, count):
    rows = [sum((word & 0xFFFFFFFF) << 32 * place for place, word in enumerate(row)) for row in words.tolist()]
    return torch.tensor([[row >> bits * place & 2**bits - 1 for place in range(count)] for row in rows])


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_int_quantized_and_its_activations(symmetric, tmp_path):
    activations = QuantizationArgs(num_bits=8, dynamic=True, strategy="token")
    settings, compress = ct(
        "int-quantized", num_bits=8, symmetric=symmetric, strategy="channel", activations=activations
    )

    def layer(name, weight):
        return compress(qparams(weight, 8, weight.shape[1], symmetric=symmetric))

    model = write_folder(tmp_path / "m", layer, settings, dtype=torch.bfloat16)
    checkpoint = check(tmp_path / "m", model, IntGrid(8, "channel", symmetric=symmetric, scale_dtype="bfloat16"))
    assert any("activations" in note for note in checkpoint.notes)


@pytest.mark.parametrize("strategy", ["channel", "tensor"])
def test_float_quantized(strategy, tmp_path):
    settings, compress = ct("float-quantized", num_bits=8, type="float", symmetric=True, strategy=strategy)

    def layer(name, weight):
        scale = weight.abs().amax(1, keepdim=True) if strategy == "channel" else weight.abs().amax().reshape(1)
        return compress({"weight": weight, "weight_scale": (scale / 448).bfloat16()})

    model = write_folder(tmp_path / "m", layer, settings, dtype=torch.bfloat16)
    check(tmp_path / "m", model, Float8(strategy, "bfloat16"))


def e2m1(packed):
    """What packed E2M1 codes stand for: OCP Microscaling Formats Specification 1.0, section 5.3.3."""
    nibbles = torch.stack([packed & 15, packed >> 4], -1).flatten(1).long()
    positive = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    return torch.cat([positive, -positive])[nibbles]


def test_mxfp4(tmp_path):
    settings, compress = ct(
        "mxfp4-pack-quantized", num_bits=4, type="float", symmetric=True, strategy="group", group_size=32
    )

    def layer(name, weight):
        exponent = torch.floor(torch.log2(weight.reshape(len(weight), -1, 32).abs().amax(-1))) - 2
        parts, meant = compress({"weight": weight, "weight_scale": (2**exponent).bfloat16()})
        assert torch.equal(e2m1(parts["weight_packed"]) * 2.0 ** exponent.repeat_interleave(32, 1), meant)
        return parts, meant

    model = write_folder(tmp_path / "m", layer, settings, dtype=torch.bfloat16)
    check(tmp_path / "m", model, MXFP4())


def test_nvfp4(tmp_path):
    settings, compress = ct(
        "nvfp4-pack-quantized", num_bits=4, type="float", symmetric=True, strategy="tensor_group", group_size=16
    )
    oracle = {}

    def layer(name, weight):
        whole = (448 * 6 / weight.abs().amax()).float().reshape(1)
        scale = (whole * weight.reshape(len(weight), -1, 16).abs().amax(-1) / 6).to(torch.float8_e4m3fn)
        parts, oracle[name] = compress({"weight": weight, "weight_scale": scale.float(), "weight_global_scale": whole})
        return parts, weight

    write_folder(tmp_path / "m", layer, settings, dtype=torch.bfloat16)
    checkpoint = sparc.read_checkpoint(tmp_path / "m")
    stored = load_file(tmp_path / "m/model.safetensors")
    for name, theirs in oracle.items():
        packed, scale, whole = (stored[f"{name}.weight_{part}"] for part in ("packed", "scale", "global_scale"))
        expected = e2m1(packed) * (scale.float() / whole).repeat_interleave(16, 1)
        grid, found = checkpoint.grids[f"{name}.weight"], checkpoint.model.get_parameter(f"{name}.weight")
        assert str(grid.spec) == str(NVFP4())
        assert torch.equal(grid.tensors["scale"], scale.view(torch.uint8))
        assert torch.allclose(found, expected, rtol=4e-7, atol=0)  # a division there is a product with 1 / scale here
        assert torch.allclose(found, theirs, rtol=2**-7, atol=0)  # computed in bfloat16


# FP8 ------------------------------------------------------------------------------------------------------------------
def test_fp8_with_blocks_of_rows_and_columns(tmp_path):
    settings = {"quant_method": "fp8", "weight_block_size": [32, 40], "activation_scheme": "dynamic"}

    def layer(name, weight):
        rows, columns = weight.shape
        scale = torch.rand(-(-rows // 32), -(-columns // 40)) + 0.5
        spread = scale.repeat_interleave(32, 0)[:rows].repeat_interleave(40, 1)[:, :columns]
        stored = (weight / spread).to(torch.float8_e4m3fn)
        return {"weight": stored, "weight_scale_inv": scale}, stored.float() * spread

    model = write_folder(tmp_path / "m", layer, settings, dtype=torch.bfloat16)
    check(tmp_path / "m", model, Float8(40))


# compiling ------------------------------------------------------------------------------------------------------------
def compiled(checkpoint, target, layers):
    artifact = sparc.compile(checkpoint, {"input_ids": IDS}, recipe="keep", target=target, measure=False)
    found, expected = artifact(input_ids=IDS)["logits"], logits(checkpoint.model)
    assert (found - expected).norm() <= (0 if target == "reference" else 1e-4) * expected.norm()
    assert len(weight_decodes(artifact.program)) == layers + sum("proj" not in name for name in checkpoint.grids)
    return artifact


@pytest.mark.parametrize("target", ["reference", "onnx"])
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_keep_compiles_the_codes(method, target, tmp_path):
    given = (gptq(), GPTQ) if method == "gptq" else (awq, AWQ)
    write_folder(tmp_path / "m", *given)
    artifact = compiled(sparc.read_checkpoint(tmp_path / "m"), target, 7)
    assert "SPARC120" in {each.code.id for each in artifact.diagnostics}


def test_the_command_line_compiles_a_folder_as_it_is(tmp_path, capsys):
    write_folder(tmp_path / "m", awq, AWQ)
    options = ["--target", "reference", "--no-measure", "--json"]
    assert run(["compile", str(tmp_path / "m"), "-o", str(tmp_path / "out"), *options]) == 0
    assert "IntGrid(bits=4, group=32, symmetric=False, scale_dtype='float16')" in capsys.readouterr().out
