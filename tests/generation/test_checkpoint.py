"""Checkpoints generate: the grids of a file reach the program with a cache, and its tokenizer the artifact."""

from dataclasses import replace

import torch

import sparc
from sparc.checkpoint.base import Checkpoint
from sparc.encoding.int_grid import IntGrid
from tests.generation.decoders import decoder, prompts
from tests.generation.test_text import TEMPLATE, byte_tokenizer


def stored(spec: IntGrid) -> Checkpoint:
    """A tiny Llama whose linear weights lie on grids, as a reader would give it."""
    model = decoder("llama")
    grids = {}
    for name, parameter in model.named_parameters():
        if name.endswith("proj.weight"):
            grids[name] = spec.fit(parameter.detach())
            parameter.data.copy_(spec.round(parameter.detach(), grids[name]))
    return Checkpoint(model, grids, "a test")


def test_codes_are_kept_and_tokens_are_the_models() -> None:
    checkpoint = stored(IntGrid(4, group=16, symmetric=False, zero="minimum"))
    expected = checkpoint.model.generate(**prompts(), max_new_tokens=8, do_sample=False)  # type: ignore[operator]
    for target in ("reference", "onnx"):
        artifact = sparc.compile(checkpoint, task="text-generation", recipe="keep", target=target, measure=False)
        rows = {row.weight: row.encoding for row in artifact.ledger.sites}
        assert {name for name, encoding in rows.items() if "IntGrid" in encoding} == set(checkpoint.grids)
        assert torch.equal(artifact.generate(**prompts(), max_new_tokens=8), expected)


def test_tokenizer_and_template_come_along() -> None:
    checkpoint = replace(stored(IntGrid(8)), tokenizer=byte_tokenizer(), chat=TEMPLATE)
    artifact = sparc.compile(checkpoint, task="text-generation", recipe="keep", target="reference", measure=False)
    assert artifact.attachments["tokenizer.json"] == byte_tokenizer().to_str().encode()
    assert artifact.attachments["chat_template.jinja"] == TEMPLATE.encode()
