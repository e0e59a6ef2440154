"""Hugging Face folders on the command line: read locally, with example inputs of their kind, or refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import sparc
from sparc.cli import run
from sparc.cli.huggingface import load_folder
from sparc.diag import CaptureError

transformers = pytest.importorskip("transformers")

TEXT = {
    "vocab_size": 99, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
    "max_position_embeddings": 32,
}  # fmt: skip
IMAGE = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip


def save(folder: Path, architecture: str, config: str, values: dict[str, Any]) -> Path:
    torch.manual_seed(0)
    model = getattr(transformers, architecture)(getattr(transformers, config)(**values))
    model.save_pretrained(folder)
    return folder


CASES = {
    "encoder": ("BertForSequenceClassification", "BertConfig", TEXT, {"input_ids": (2, 16), "attention_mask": (2, 16)}),
    "decoder": ("LlamaForCausalLM", "LlamaConfig", TEXT, {"input_ids": (2, 16), "attention_mask": (2, 16)}),
    "encoder and decoder": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"vocab_size": 99, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2},
        {"input_ids": (2, 16), "attention_mask": (2, 16), "decoder_input_ids": (2, 16)},
    ),
    "vision": ("ViTForImageClassification", "ViTConfig", IMAGE, {"pixel_values": (2, 3, 16, 16)}),
    "text and vision": (
        "CLIPModel",
        "CLIPConfig",
        {"text_config": TEXT, "vision_config": IMAGE},
        {"input_ids": (2, 16), "attention_mask": (2, 16), "pixel_values": (2, 3, 16, 16)},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_example_inputs_are_of_the_models_kind(case: str, tmp_path: Path) -> None:
    architecture, config, values, shapes = CASES[case]
    arguments = load_folder(save(tmp_path / "model", architecture, config, values))
    assert type(arguments["model"]).__name__ == architecture
    assert not arguments["model"].training
    inputs = arguments["example_inputs"]
    assert {name: tuple(value.shape) for name, value in inputs.items() if isinstance(value, torch.Tensor)} == shapes
    assert set(arguments["dynamic"]) == set(shapes)
    assert all(axes[0] == "batch" for axes in arguments["dynamic"].values())
    with torch.no_grad():
        arguments["model"](**inputs)


def test_half_precision_is_read_as_float32(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", "BertModel", "BertConfig", TEXT)
    transformers.BertModel.from_pretrained(folder).half().save_pretrained(folder)
    assert {parameter.dtype for parameter in load_folder(folder)["model"].parameters()} == {torch.float32}


def test_a_folder_compiles_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save(tmp_path / "model", "BertModel", "BertConfig", TEXT)
    options = ["--target", "reference", "--no-measure", "--json"]
    assert run(["compile", str(folder), "-o", str(tmp_path / "out"), *options]) == 0
    assert len(json.loads(capsys.readouterr().out)["sites"]) >= 6
    artifact = sparc.load(tmp_path / "out")
    ids = torch.ones(1, 5, dtype=torch.int64)
    assert artifact(input_ids=ids, attention_mask=ids)["last_hidden_state"].shape == (1, 5, 16)
    assert str(tmp_path).encode() not in b"".join(path.read_bytes() for path in (tmp_path / "out").iterdir())


def refused(folder: Path) -> str:
    with pytest.raises(CaptureError) as caught:
        load_folder(folder)
    assert caught.value.code == "SPARC110"
    return str(caught.value)


def test_code_in_the_folder_is_never_run(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", "BertModel", "BertConfig", TEXT)
    config = json.loads((folder / "config.json").read_text())
    (folder / "modeling.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "modeling.Model"}}))
    assert "code of its own" in refused(folder)
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "custom", "architectures": ["os.system"]}))
    assert str(tmp_path) not in refused(folder)
    assert not (tmp_path / "ran").exists()


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", "BertModel", "BertConfig", TEXT)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "safetensors" in refused(folder)


@pytest.mark.parametrize("config", [None, "nonsense", "[]", "{}", "[" * 100_000])
def test_folders_that_hold_no_model(config: str | None, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"nonsense")
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    refused(tmp_path)
