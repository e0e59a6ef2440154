"""Hugging Face folders of tiny compressed Llamas, packed by plain loops as the formats are described."""

import json

import pytest
import torch
from safetensors.torch import save_file

import sparc
from sparc.diag import CaptureError
from tests.checkpoint.gguf_files import tiny

IDS = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(1))
Q = "model.layers.0.self_attn.q_proj"


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def layers(model):
    """The names of the linear layers that tools compress: all but the head."""
    found = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    return [name for name in found if name != "lm_head"]


def write_folder(folder, compress, settings, *, dtype=torch.float16, remove=(), more=None):
    """Save a tiny Llama whose linear layers are what `compress(name, weight [out, in])` returns: tensors by the last
    part of their names, and the float32 weight that they stand for.

    Returns:
        the model with those weights.
    """
    model = tiny(tied=False, hidden_size=64, intermediate_size=96, head_dim=16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype))
    tensors = {name: value.to(dtype) for name, value in model.state_dict().items()}
    for name in layers(model):
        weight = tensors.pop(f"{name}.weight").float()
        parts, meant = compress(name, weight)
        tensors |= {f"{name}.{part}": value.contiguous() for part, value in parts.items() if part not in remove}
        with torch.no_grad():
            model.get_parameter(f"{name}.weight").copy_(meant)
    folder.mkdir(exist_ok=True)
    save_file({**tensors, **(more or {})}, folder / "model.safetensors", metadata={"format": "pt"})
    described = {**model.config.to_dict(), "architectures": ["LlamaForCausalLM"], "quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(described))
    return model


def integers(weight, bits, group, *, symmetric=False, dtype=torch.float16):
    """Codes `[out, in]`, scales and zero points `[out, groups]`, and the weight that they stand for, by hand."""
    split = weight.reshape(len(weight), -1, group)
    top = 2**bits - 1
    low, high = split.amin(-1).clamp(max=0), split.amax(-1).clamp(min=0)
    if symmetric:
        high = split.abs().amax(-1)
        low = -high
    scale = ((high - low) / top).to(dtype)
    zero = torch.full_like(low, 2 ** (bits - 1)) if symmetric else (-low / scale.float()).round().clamp(0, top)
    codes = (split / scale.float()[..., None] + zero[..., None]).round().clamp(0, top)
    dense = (codes - zero[..., None]) * scale.float()[..., None]
    return codes.reshape(weight.shape).long(), scale, zero.long(), dense.reshape(weight.shape)


def pack(rows, bits):
    """Rows of codes as int32 words, one bit after the other, by a plain loop over Python's integers."""
    words = []
    for row in rows.tolist():
        stream = sum(code << (bits * place) for place, code in enumerate(row))
        count = -(-len(row) * bits // 32)
        words.append([signed32(stream >> (32 * word) & 0xFFFFFFFF) for word in range(count)])
    return torch.tensor(words, dtype=torch.int32)


def signed32(word):
    """A word of 32 bits as a signed number."""
    return word - (1 << 32) if word >> 31 else word


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}


def gptq(bits=4, *, symmetric=False, version=1, index=None, group=32, dtype=torch.float16):
    def compress(name, weight):
        columns = weight.shape[1]
        order = torch.arange(columns) if index is None else torch.argsort(index(columns), stable=True)
        codes, scale, zero, dense = integers(weight[:, order], bits, group, symmetric=symmetric, dtype=dtype)
        back = torch.argsort(order)
        parts = {
            "qweight": pack(codes[:, back].t().T, bits).T,
            "qzeros": pack(((zero - int(version == 1)) % 2**bits).T, bits),
            "scales": scale.T,
            "g_idx": (torch.arange(columns) // group if index is None else index(columns)).to(torch.int32),
        }
        return parts, dense[:, back]

    return compress


def shuffled(columns):
    return torch.arange(columns)[torch.randperm(columns, generator=torch.Generator().manual_seed(2))] // 32


AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}


def awq_pack(rows):
    """AutoAWQ's `pack`: nibble i of a word is output [0, 2, 4, 6, 1, 3, 5, 7][i] of its eight."""
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    words = [
        [signed32(sum(row[start + each] << 4 * place for place, each in enumerate(order)))
         for start in range(0, len(row), 8)]
        for row in rows.tolist()
    ]  # fmt: skip
    return torch.tensor(words, dtype=torch.int32)


def awq(name, weight):
    codes, scale, zero, dense = integers(weight, 4, 32)
    return {"qweight": awq_pack(codes.T), "qzeros": awq_pack(zero.T), "scales": scale.T}, dense


def refused(folder):
    with pytest.raises(CaptureError) as caught:
        sparc.read_checkpoint(folder)
    return caught.value
