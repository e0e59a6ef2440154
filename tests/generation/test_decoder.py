"""Capture with a cache: any decoder of transformers computes, at every size, what it computes itself."""

from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

import sparc
from sparc.cache import empty_slots
from sparc.capture import capture
from sparc.diag import CaptureError
from sparc.generation.decoder import Decoder, describe
from sparc.program import Program
from tests.generation.decoders import CONFIGS, VOCABULARY, decoder, prompts
from tests.generation.encoder_decoders import encoder_decoder

_QUICK = ("llama", "mistral", "gpt2", "qwen3_moe")
NAMES = [name if name in _QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CONFIGS]


@cache
def captured(name: str) -> tuple[nn.Module, Program]:
    """A decoder, and the program that is captured of it."""
    model = decoder(name)
    examples, dynamic, slots = describe(model)
    program = capture(Decoder(model), examples, dynamic=dynamic)
    program.main.cache = slots
    return model, program


@pytest.mark.parametrize("name", NAMES)
def test_logits_and_cache_at_other_sizes(name: str) -> None:
    model, program = captured(name)
    own = Decoder(model)
    for batch, count, past in ((1, 7, 0), (3, 1, 9), (1, 1, 1), (2, 4, 6)):
        generator = torch.Generator().manual_seed(count)
        ids = torch.randint(5, VOCABULARY, (batch, count), generator=generator)
        slots = [torch.randn(each.shape, generator=generator) for each in empty_slots(program.main, batch, past)]
        layers = [{"key": key, "value": value} for key, value in zip(slots[::2], slots[1::2], strict=True)]
        mask = torch.ones(batch, past + count, dtype=torch.int64)
        mask[1:2, :2] = 0
        named: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "past_key_values": layers}
        found = program.run(**named)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, past:]
        with torch.no_grad():
            expected = own(ids, mask, positions, torch.arange(count), layers)
        torch.testing.assert_close(found["logits"], expected["logits"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found["present"], expected["present"], rtol=1e-4, atol=1e-5)


def test_only_the_wanted_places_have_logits() -> None:
    _, program = captured("llama")
    ids = torch.arange(5, 12)[None]
    every = program.run(input_ids=ids)["logits"]
    assert every.shape == (1, 7, VOCABULARY)
    some = program.run(input_ids=ids, logits_to_keep=torch.tensor([6, 0]))["logits"]
    torch.testing.assert_close(some, every[:, [6, 0]])


def test_weights_keep_the_names_of_the_model() -> None:
    _, program = captured("llama")
    assert set(program.weights) >= {"model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"}


def test_training_mode_is_left_as_it_was() -> None:
    model = decoder("llama").train()
    describe(model)
    assert model.training
    assert all(child.training for child in model.children())


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: nn.Linear(2, 2), "no language model"),
        (lambda: decoder("llama").model, "no language model"),
        (lambda: _mamba(), "takes no past_key_values"),
        (lambda: encoder_decoder("t5"), "has an encoder"),
    ],
)
def test_models_without_such_a_cache_are_refused(make: Any, why: str) -> None:
    with pytest.raises(CaptureError, match=f"SPARC112.*{why}"):
        describe(make())


def _mamba() -> Any:
    from transformers import MambaConfig, MambaForCausalLM

    return MambaForCausalLM(MambaConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1))


def test_a_row_of_zeros_in_a_tied_head_is_no_trouble_in_8_bits() -> None:
    model = decoder("gemma3", hidden_size=64, intermediate_size=128, head_dim=16, sliding_window=8)
    assert not model.lm_head.weight[0].any()  # the padding token's
    artifact = sparc.compile(model, task="text-generation", recipe="w8", target="onnx", measure=False)
    logits = artifact(**prompts())["logits"]
    assert not logits[..., 0].abs().max() > 1e-6
