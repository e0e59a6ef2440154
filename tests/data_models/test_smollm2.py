import copy

import pytest
import torch

from examples.models import evaluate, smollm2, smollm2_twin
from examples.models.texts import GENRES, calibration_text, held_out_text

pytestmark = pytest.mark.models


@pytest.fixture(scope="module")
def reader():
    return smollm2.read_gguf()


@pytest.fixture(scope="module")
def tokenizer():
    return smollm2.load_tokenizer()


@pytest.fixture(scope="module")
def model(reader):
    return smollm2.load(reader)


@pytest.mark.parametrize("genre", GENRES)
def test_tokenizer_round_trip(tokenizer, genre):
    text = held_out_text(genre) + calibration_text(genre)
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_tokenizer_splits_digits_and_keeps_special_tokens(tokenizer):
    text = "<|im_start|>user\nadd 12345 + ünï日本<|im_end|>"
    encoded = tokenizer.encode(text)
    assert encoded.ids[0] == 1
    assert encoded.ids[-1] == 2
    assert [token for token in encoded.tokens if token.isdigit()] == list("12345")
    assert tokenizer.decode(encoded.ids, skip_special_tokens=False) == text


def test_held_out_tokens_are_enough_and_unseen(tokenizer):
    held_out = smollm2.held_out_tokens(tokenizer=tokenizer)
    calibration = smollm2.calibration_tokens(tokenizer=tokenizer)
    assert held_out.shape == (40, 512)
    assert held_out.numel() >= 20_480

    def runs_of_sixteen(windows):
        return {tuple(row[start : start + 16]) for row in windows.tolist() for start in range(len(row) - 15)}

    assert not runs_of_sixteen(held_out) & runs_of_sixteen(calibration)
    with pytest.raises(ValueError, match="no multiple"):
        smollm2.held_out_tokens(3, tokenizer)


def test_model_knows_the_capital_of_france(model, tokenizer):
    ids = torch.tensor([tokenizer.encode("The capital of France is").ids])
    with torch.no_grad():
        best = model(input_ids=ids)[0, -1].argmax().item()
    assert tokenizer.decode([best]) == " Paris"


def test_embedding_and_head_are_one_parameter(model):
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_perplexity_is_of_a_language_model(model, tokenizer):
    windows = smollm2.held_out_tokens(4, tokenizer)[:, :128]
    shuffled = windows[:, torch.randperm(128, generator=torch.Generator().manual_seed(0))]
    assert evaluate.perplexity(model, windows) < 60
    assert evaluate.perplexity(model, shuffled) > 300


def test_perplexity_of_a_uniform_guess_is_the_vocabulary():
    windows = torch.arange(40).reshape(4, 10)
    guess = evaluate.perplexity(lambda input_ids: torch.zeros(*input_ids.shape, 40), windows)
    assert guess == pytest.approx(40, rel=1e-5)


def test_twin_computes_the_same_with_other_weights(model, tokenizer):
    twin = smollm2_twin.scale_columns(copy.deepcopy(model))
    ids = smollm2.held_out_tokens(4, tokenizer)[:2, :64]
    with torch.no_grad():
        expected, actual = model(input_ids=ids), twin(input_ids=ids)
    assert (actual - expected).abs().max() <= 1e-4 * expected.abs().max()
    changed = {name for name, weight in twin.named_parameters() if not torch.equal(weight, model.get_parameter(name))}
    kinds = {name.split(".", 3)[-1] for name in changed if name.startswith("model.layers.")}
    assert kinds >= {f"self_attn.{name}_proj.weight" for name in "qkvo"}
    assert kinds >= {f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
    assert not [name for name in changed if "embed" in name or "lm_head" in name]


def test_twin_is_seeded():
    first, again, other = (smollm2_twin.column_factors(8, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.min() >= 0.9
    assert first.max() <= 1.1


def test_compile_arguments_run(model, tokenizer):
    arguments = smollm2.compile_arguments(model, tokenizer)
    assert all(item["input_ids"].shape == (2, 256) for item in arguments["data"])
    inputs = arguments["example_inputs"]
    with torch.no_grad():
        logits = arguments["model"](**inputs)
    assert logits.shape == (*inputs["input_ids"].shape, 49152)
    assert not model.training
