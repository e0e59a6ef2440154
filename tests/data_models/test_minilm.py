import pytest
import torch

from examples.models import evaluate, minilm

pytestmark = pytest.mark.models


@pytest.fixture(scope="module")
def model():
    return minilm.load()


def test_embeddings_tell_meanings_apart(model):
    a, b, c = evaluate.sentence_embeddings(
        model, ["A man is eating food.", "Someone is having a meal.", "The stock market fell sharply today."]
    )
    assert a @ b > 0.5
    assert a @ c < 0.2


def test_embeddings_keep_their_order_and_ignore_padding(model):
    sentences = [
        "Short.",
        "A longer sentence, which makes the tokenizer pad the others.",
        "Hello there!",
    ]
    together = evaluate.sentence_embeddings(model, sentences)
    alone = torch.cat([evaluate.sentence_embeddings(model, [sentence]) for sentence in sentences])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


def test_a_model_agrees_with_itself_and_not_with_a_broken_one(model):
    sentences = [
        "One thing is certain.",
        "The cat sat on the mat.",
        "A cat is sitting on a rug.",
        "Nothing is certain.",
    ]
    same = evaluate.compare_sentences(model, model, sentences)
    assert same.mean_cosine == pytest.approx(1, abs=1e-6)
    assert same.same_neighbour == 1

    def broken(**inputs):
        return {"last_hidden_state": model(**inputs).last_hidden_state.roll(1, dims=0)}

    assert evaluate.compare_sentences(broken, model, sentences).min_cosine < 0.9


def test_compile_arguments_run_and_vary_in_length(model):
    arguments = minilm.minilm()
    assert set(arguments) == {"model", "example_inputs", "dynamic", "data"}
    assert sum(len(item["input_ids"]) for item in arguments["data"]) >= 64
    assert len({item["input_ids"].shape[1] for item in arguments["data"]}) > 1
    inputs = arguments["example_inputs"]
    assert set(inputs) == set(arguments["dynamic"])
    assert min(min(tensor.shape) for tensor in inputs.values()) > 1
    with torch.no_grad():
        output = arguments["model"](**inputs).last_hidden_state
    assert output.shape == (*inputs["input_ids"].shape, 384)
    assert not arguments["model"].training
