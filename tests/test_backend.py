"""torch.compile with the backend sparc: parity, graph breaks, sizes, results, generation."""

import pytest
import torch
from torch import nn

from sparc import SparcWarning
from sparc.backend import Backend
from tests.backends import MODELS, Mlp, Transformer, Views, compiled, fresh_dynamo, signal


@pytest.fixture(autouse=True)
def fresh():
    with fresh_dynamo():
        yield


# parity ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("target", ["reference", "onnx"])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_computes_what_it_computes_in_eager_torch(name, target):
    make, inputs = MODELS[name]
    model, x = make().eval(), inputs()
    fast, backend = compiled(model, target=target, fullgraph=True)
    torch.testing.assert_close(fast(*x), model(*x), rtol=1e-4, atol=1e-5)
    assert [fragment.compiled for fragment in backend.fragments] == [True]


@pytest.mark.parametrize("target", ["reference", "onnx"])
@pytest.mark.parametrize("name", MODELS)
def test_weights_are_compressed_under_the_users_names(name, target):
    make, inputs = MODELS[name]
    model, x = make().eval(), inputs()
    fast, backend = compiled(model, recipe="w8", target=target)
    assert signal(model(*x), fast(*x)) > 25
    (artifact,) = backend.fragments[0].artifacts
    sites = {row.weight: row.encoding for row in artifact.ledger.sites}
    assert set(sites) <= set(model.state_dict())
    assert "IntGrid(bits=8)" in sites.values()


def test_compressing_changes_the_results():
    model, x = Mlp().eval(), torch.randn(4, 32)
    fast, _ = compiled(model, recipe="w8")
    assert not torch.equal(fast(x), model(x))


@pytest.mark.parametrize(
    ("dtype", "recipe", "target"),
    [(torch.float16, "w8", "reference"), (torch.bfloat16, "w8", "reference"), (torch.float16, "dense", "onnx")],
)
def test_half_precision(dtype, recipe, target):
    model, x = Mlp().eval().to(dtype), torch.randn(4, 32, dtype=dtype)
    fast, backend = compiled(model, recipe=recipe, target=target)
    y = fast(x)
    assert y.dtype == dtype
    assert signal(model(x).float(), y.float()) > 25
    assert backend.fragments[0].compiled


def test_inference_mode():
    model = Mlp().eval()
    with torch.inference_mode():
        fast, backend = compiled(model)
        x = torch.randn(4, 32)
        torch.testing.assert_close(fast(x), model(x))
    assert backend.fragments[0].compiled


def test_two_models_side_by_side():
    models, x = [Mlp().eval(), Mlp().eval()], torch.randn(4, 32)
    fast = [compiled(model)[0] for model in models]
    for _ in range(2):
        for ours, model in zip(fast, models, strict=True):
            torch.testing.assert_close(ours(x), model(x))


# graph breaks, sizes --------------------------------------------------------------------------------------------------
class Broken(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = Mlp(), Mlp()

    def forward(self, x):
        total = x.sum()
        x = self.first(x)
        view = x[:, 0]
        if total > 0:  # dynamo stops here
            view.add_(1)
        else:
            view.sub_(1)
        return self.second(x)


@pytest.mark.parametrize("target", ["reference", "onnx"])
def test_a_branch_in_the_middle(target):
    model = Broken().eval()
    fast, backend = compiled(model, target=target)
    x = torch.ones(4, 32)
    for sign in (1, -1):
        with pytest.warns(SparcWarning, match="SPARC105"):  # what follows the branch writes to its input
            actual = fast(sign * x)
        torch.testing.assert_close(actual, model(sign * x), rtol=1e-4, atol=1e-5)
    assert [fragment.compiled for fragment in backend.fragments] == [True, False, False]


def test_modules_that_share_code_keep_their_own_weights():
    layers, x = [Mlp().eval() for _ in range(3)], torch.randn(4, 32)
    backend = Backend("dense", "reference")

    def run(layer, x):
        return layer(x)

    fast = torch.compile(run, backend=backend)
    for layer in layers:
        torch.testing.assert_close(fast(layer, x), layer(x))
    (fragment,) = backend.fragments
    artifacts = list(fragment.artifacts)
    assert len(artifacts) == 3
    for layer in layers:
        torch.testing.assert_close(fast(layer, x), layer(x))
    assert set(fragment.artifacts) == set(artifacts)


@pytest.mark.parametrize("target", ["reference", "onnx"])
def test_a_new_batch_size_compiles_once_more(target):
    model = Transformer().eval()
    fast, backend = compiled(model, target=target)
    for batch, length in [(2, 5), (3, 5), (4, 7), (5, 9), (6, 11)]:
        ids = torch.randint(0, 50, (batch, length))
        torch.testing.assert_close(fast(ids), model(ids), rtol=1e-4, atol=1e-5)
    assert len(backend.fragments) <= 3
    assert all(fragment.compiled for fragment in backend.fragments)


@pytest.mark.parametrize("target", ["reference", "onnx"])
def test_sizes_declared_dynamic_compile_once(target):
    model = Mlp().eval()
    fast, backend = compiled(model, target=target, dynamic=True)
    for rows in (4, 5, 9):
        x = torch.randn(rows, 32)
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)
    x = torch.randn(3, 7, 32)
    torch._dynamo.mark_dynamic(x, 1)
    torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)
    assert len(backend.fragments) == 2


# inputs and results ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("target", ["reference", "onnx"])
def test_results_of_every_kind(target):
    model = Views().eval()
    fast, backend = compiled(model, target=target)
    for rows in (3, 5, 6):
        x = torch.randn(rows, 32)
        actual, expected = fast(x), model(x)
        assert actual[3] is None
        assert actual[4] is x
        assert actual[5] == expected[5]
        assert actual[8][1] == "text"
        for index in (0, 1, 2, 6, 7):
            torch.testing.assert_close(actual[index], expected[index], rtol=1e-4, atol=1e-5)
            assert actual[index].stride() == expected[index].stride()
        assert actual[1].data_ptr() == actual[8][0].data_ptr() == actual[0].data_ptr()
        assert actual[2].data_ptr() == x.data_ptr()
    assert all(fragment.compiled for fragment in backend.fragments)


@pytest.mark.parametrize("target", ["reference", "onnx"])
def test_results_are_not_the_compilers_own(target):
    class Constant(Mlp):
        def forward(self, x):
            return super().forward(x), torch.arange(4.0) + 1, x.clone(), self.up.bias + 0

    model, x = Constant().eval(), torch.randn(4, 32)
    fast, backend = compiled(model, target=target)
    before, bias = x.clone(), model.up.bias.clone()
    for _ in range(2):
        results = fast(x)
        for actual, expected in zip(results, model(x), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
        for result in results:
            result.fill_(7)
    assert torch.equal(x, before)
    assert torch.equal(model.up.bias, bias)
    assert backend.fragments[0].compiled


@pytest.mark.parametrize("target", ["reference", "onnx"])
def test_inputs_that_are_not_contiguous(target):
    model, base = Mlp().eval(), torch.randn(32, 4)
    fast, backend = compiled(model, target=target)
    for x in (base.t(), torch.randn(1, 32).expand(4, 32), torch.randn(8, 64)[::2, ::2]):
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)
    assert all(fragment.compiled for fragment in backend.fragments)


@pytest.mark.parametrize("dynamic", [None, True])
def test_numbers_are_constants_that_are_compiled_anew(dynamic):
    class Numbers(Mlp):
        def forward(self, x, times=2, flag=True, scale=0.5):
            return super().forward(x).repeat(times, 1) * (scale if flag else times), times + 1

    model, x = Numbers().eval(), torch.randn(3, 32)
    fast, backend = compiled(model, dynamic=dynamic)
    calls = [(2, True, 0.5), (3, True, 0.5), (4, False, 0.5), (3, True, 0.75), (3, True, 1.5), (2, True, 0.5)]
    for call in calls:
        torch.testing.assert_close(fast(x, *call), model(x, *call))
    assert all(fragment.compiled for fragment in backend.fragments)
    assert len(backend.fragments) <= len(calls)


@pytest.mark.parametrize("target", ["reference", "onnx"])
def test_pieces_and_writes_to_what_was_computed(target):
    class Pieces(Mlp):
        def forward(self, x, mask):
            y = super().forward(x)
            values, indices = torch.topk(y, 3)
            y = y.masked_fill(mask, 0.0)
            y += 1
            y[:, :2] *= 2
            left, right = y.chunk(2, -1)
            return left, right, values, indices, self.up.weight.t(), x.split(2)

    model = Pieces().eval()
    fast, backend = compiled(model, target=target)
    for rows in (4, 6):
        x = torch.randn(rows, 32)
        actual, expected = fast(x, x > 0), model(x, x > 0)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
        assert actual[0].untyped_storage().data_ptr() == actual[1].untyped_storage().data_ptr()
        assert actual[4].data_ptr() == model.up.weight.data_ptr()
    assert all(fragment.compiled for fragment in backend.fragments)


# generation -----------------------------------------------------------------------------------------------------------
def llama():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize(
    ("recipe", "target"),
    [
        ("dense", "onnx"),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in (("dense", "reference"), ("w8", "onnx"))),
    ],
)
def test_generation_with_a_growing_cache(recipe, target):
    model, prompt = llama(), torch.tensor([[5, 9, 2, 11, 7]])
    expected = model.generate(prompt, max_new_tokens=8, do_sample=False)
    backend = Backend(recipe, target)
    model.forward = torch.compile(model.forward, backend=backend)
    tokens = model.generate(prompt, max_new_tokens=8, do_sample=False)
    assert tokens.shape == (1, 13)
    if recipe == "dense":
        assert torch.equal(tokens, expected)
    assert len(backend.fragments) <= 3
    assert all(len(fragment.artifacts) == 1 for fragment in backend.fragments)
