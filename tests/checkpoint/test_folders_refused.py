"""Folders of compressed weights that contradict themselves, or are of an unknown kind, are refused with a code."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import sparc
from sparc.diag import SparcError
from tests.checkpoint.folders import AWQ, GPTQ, Q, awq, gptq, refused, write_folder

UNKNOWN = {
    "another tool": {"quant_method": "bitsandbytes"},
    "no tool": {},
    "bits": {**GPTQ, "bits": 5},
    "bits that are text": {**GPTQ, "bits": "4"},
    "form": {**GPTQ, "checkpoint_format": "marlin"},
    "form that is a list": {**GPTQ, "checkpoint_format": ["gptq"]},
    "tool that is a list": {"quant_method": ["gptq"]},
    "settings by layer": {**GPTQ, "dynamic": {"a": {"bits": 8}}},
    "no settings": [1],
    "AWQ's other version": {**AWQ, "version": "gemv"},
    "compressed sparsity": {"quant_method": "compressed-tensors", "format": "sparse-24-bitmask"},
}


def words(name, weight):
    return {"weight_packed": torch.zeros(len(weight), 8, dtype=torch.int32)}, weight


@pytest.mark.parametrize("case", UNKNOWN)
def test_unknown_settings_are_refused(case, tmp_path):
    settings = UNKNOWN[case]
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    write_folder(tmp_path / "m", {"awq": awq, "gptq": gptq()}.get(str(method), words), settings)
    assert refused(tmp_path / "m").code == "SPARC118"


def test_a_plain_folder_is_no_compressed_one(tmp_path):
    write_folder(tmp_path / "m", gptq(), GPTQ)
    described = json.loads((tmp_path / "m/config.json").read_text())
    del described["quantization_config"]
    (tmp_path / "m/config.json").write_text(json.dumps(described))
    assert refused(tmp_path / "m").code == "SPARC118"


def changed(folder, change):
    """Rewrite the tensors of a folder."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


CHANGES = {
    "no zero points": (lambda t: t.pop(f"{Q}.qzeros"), "SPARC117"),
    "zero points of other groups": (lambda t: t.update({f"{Q}.qzeros": t[f"{Q}.qzeros"][:1].clone()}), "SPARC117"),
    "codes of another width": (lambda t: t.update({f"{Q}.qweight": t[f"{Q}.qweight"][:4].clone()}), "SPARC117"),
    "codes that are floats": (lambda t: t.update({f"{Q}.qweight": t[f"{Q}.qweight"].float()}), "SPARC117"),
    "no scales": (lambda t: t.update({f"{Q}.scales": torch.zeros(0, 64, dtype=torch.float16)}), "SPARC117"),
    "scales of one dimension": (lambda t: t.update({f"{Q}.scales": t[f"{Q}.scales"][0].clone()}), "SPARC117"),
    "scales that are infinite": (lambda t: t[f"{Q}.scales"].fill_(torch.inf), "SPARC106"),
    "groups that do not exist": (lambda t: t[f"{Q}.g_idx"].fill_(2**31 - 1), "SPARC117"),
    "groups below 0": (lambda t: t[f"{Q}.g_idx"].fill_(-2), "SPARC117"),
    "another norm": (lambda t: t.update({"model.norm.weight": torch.ones(32)}), "SPARC119"),
    "no norm": (lambda t: t.pop("model.norm.weight"), "SPARC119"),
    "one weight more": (lambda t: t.update({"model.layers.1.mlp.up_proj.weight": torch.ones(4, 4)}), "SPARC119"),
    "codes without an encoding": (lambda t: t.update({"model.norm.weight": torch.ones(64).char()}), "SPARC118"),
    "a norm that is infinite": (lambda t: t["model.norm.weight"].fill_(torch.inf), "SPARC106"),
}  # fmt: skip


@pytest.mark.parametrize("case", CHANGES)
def test_tensors_that_do_not_fit_are_refused(case, tmp_path):
    change, code = CHANGES[case]
    write_folder(tmp_path / "m", gptq(), GPTQ)
    changed(tmp_path / "m", change)
    assert refused(tmp_path / "m").code == code


CONFIGS = {
    "another width": ({"hidden_size": 128}, {"SPARC119"}),
    "a billion layers": ({"num_hidden_layers": 10**9}, {"SPARC119"}),
    "a huge vocabulary": ({"vocab_size": 10**15}, {"SPARC119"}),
    "another architecture": ({"architectures": ["BertModel"], "model_type": "bert"}, {"SPARC119"}),
    "no heads": ({"num_attention_heads": 0}, {"SPARC110", "SPARC119"}),
    "layers that are text": ({"num_hidden_layers": "two"}, {"SPARC110"}),
    "an unknown type": ({"architectures": ["Nothing"], "model_type": "nothing"}, {"SPARC110"}),
    "code of its own": ({"auto_map": {"AutoModel": "x.y"}}, {"SPARC110"}),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configs_that_do_not_fit_are_refused(case, tmp_path):
    values, codes = CONFIGS[case]
    write_folder(tmp_path / "m", gptq(), GPTQ)
    described = json.loads((tmp_path / "m/config.json").read_text())
    (tmp_path / "m/config.json").write_text(json.dumps({**described, **values}))
    assert refused(tmp_path / "m").code in codes


def test_a_file_cut_short_is_refused(tmp_path):
    write_folder(tmp_path / "m", gptq(), GPTQ)
    path = tmp_path / "m/model.safetensors"
    data = path.read_bytes()
    for length in (0, 4, 8, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        assert refused(tmp_path / "m").code == "SPARC116", length


def test_a_header_that_lies_is_refused(tmp_path):
    write_folder(tmp_path / "m", gptq(), GPTQ)
    path = tmp_path / "m/model.safetensors"
    data = path.read_bytes()
    for place, value in ((7, 255), (8, 0), (20, 255), (200, 1)):
        path.write_bytes(data[:place] + bytes([value]) + data[place + 1 :])
        with pytest.raises(SparcError) as caught:
            sparc.read_checkpoint(tmp_path / "m")
        assert caught.value.code in ("SPARC116", "SPARC117")


def test_a_tensor_in_two_files_is_refused(tmp_path):
    write_folder(tmp_path / "m", gptq(), GPTQ)
    save_file({"model.norm.weight": torch.ones(64)}, tmp_path / "m/model-2.safetensors")
    assert refused(tmp_path / "m").code == "SPARC117"
