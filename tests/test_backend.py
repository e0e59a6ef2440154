"""torch.compile with the backend sparc: parity, what falls back and why, weights that change, generation."""

import tomllib
from collections import Counter
from importlib import import_module
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from sparc import SparcError, SparcWarning
from sparc.backend import Backend, compile_fragment
from sparc.dynamo import user_name

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def fresh():
    """Nothing compiled before, the same weights every time, no gradients."""
    torch.compiler.reset()
    torch.manual_seed(0)
    with torch.no_grad():
        yield
    torch.compiler.reset()


class Mlp(nn.Module):
    def __init__(self, width=32):
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    """A small transformer layer with a causal mask."""

    def __init__(self, width=32, heads=4):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = Mlp(width)

    def forward(self, x):
        b, t, c = x.shape
        q, k, v = (each.view(b, t, self.heads, -1).transpose(1, 2) for each in self.qkv(self.norm(x)).split(c, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(b, t, c))
        return x + self.mlp(x)


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(32, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def conv_net():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 5),
    )  # fmt: skip


MODELS = {
    "mlp": (Mlp, lambda: (torch.randn(4, 32),)),
    "conv": (conv_net, lambda: (torch.randn(2, 3, 8, 8),)),
    "transformer": (Transformer, lambda: (torch.randint(0, 50, (2, 6)),)),
}


def compiled(model, *, recipe="dense", target="reference", **options):
    """The compiled model and its backend."""
    backend = Backend(recipe=recipe, target=target)
    return torch.compile(model, backend=backend, **options), backend


def signal(expected, actual):
    """Signal to noise in dB."""
    return float(10 * torch.log10(expected.square().sum() / (expected - actual).square().sum()))


def reasons(backend):
    return [diagnostic.code.id for fragment in backend.fragments for diagnostic in fragment.diagnostics]


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


def test_a_type_that_the_runtime_lacks():
    assert refused(Mlp().eval().bfloat16(), torch.randn(4, 32).bfloat16(), recipe="w8", target="onnx") == ["SPARC404"]


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
    for layer in [*layers, *layers]:
        torch.testing.assert_close(fast(layer, x), layer(x))
    assert [len(fragment.artifacts) for fragment in backend.fragments] == [3]


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
class Views(Mlp):
    """Results of every kind."""

    def forward(self, x, factor=2, flag=True, shift=0.5):
        y = super().forward(x) * factor + (shift if flag else 0)
        return y, y.view(-1), x.t(), None, x, x.shape[0] * factor, y.t().exp(), y.sum(0), (y[:, :3], "text")


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
    model, x = Views().eval(), torch.randn(3, 32)
    fast, backend = compiled(model, dynamic=dynamic)
    calls = [(2, True, 0.5), (3, True, 0.5), (4, False, 0.5), (3, True, 0.75), (3, True, 1.5), (2, True, 0.5)]
    for call in calls:
        actual, expected = fast(x, *call), model(x, *call)
        torch.testing.assert_close(actual[0], expected[0])
        assert actual[5] == expected[5]
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


# eager torch, with a reason -------------------------------------------------------------------------------------------
class Cached(Mlp):
    def forward(self, x, cache):
        cache[: x.shape[0]] = x
        return super().forward(x) + cache.sum()


class Dropped(Mlp):
    def forward(self, x):
        return F.dropout(super().forward(x), training=True)


def refused(model, *inputs, **options):
    """The codes of what a compiled model fell back for; it computes what the model computes."""
    fast, backend = compiled(model, **options)
    given = [each.clone() for each in inputs]
    torch.manual_seed(1)
    with pytest.warns(SparcWarning) as said:
        actual = fast(*inputs)
    torch.manual_seed(1)
    torch.testing.assert_close(actual, model(*given), equal_nan=True)
    torch.testing.assert_close(inputs, tuple(given))
    assert not any(fragment.compiled for fragment in backend.fragments)
    assert all("runs in eager torch" in str(each.message) for each in said)
    fast(*inputs)
    return reasons(backend)


def test_a_fragment_that_writes_to_its_input():
    assert refused(Cached().eval(), torch.randn(4, 32), torch.zeros(8, 32)) == ["SPARC105"]


def test_a_fragment_that_draws_random_numbers():
    assert refused(Dropped().eval(), torch.randn(4, 32)) == ["SPARC111"]


def test_a_norm_in_training():
    class Trained(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)
            self.norm.num_batches_tracked = None

        def forward(self, x):
            return self.norm(self.fc(x))

    model, x = Trained().train(), torch.randn(4, 8)
    fast, backend = compiled(model)
    with pytest.warns(SparcWarning, match="statistics"):
        fast(x)
    assert reasons(backend) == ["SPARC105"]
    assert not torch.equal(model.norm.running_mean, torch.zeros(8))


def test_training_keeps_its_gradients():
    model, x = Mlp(), torch.randn(4, 32)
    fast, backend = compiled(model)
    with torch.enable_grad(), pytest.warns(SparcWarning, match=r"SPARC112[\s\S]*no_grad"):
        fast(x).sum().backward()
    assert model.up.weight.grad is not None
    assert reasons(backend) == ["SPARC112"]
    torch.testing.assert_close(fast(x), model(x))
    assert [fragment.compiled for fragment in backend.fragments] == [False, True]


@pytest.mark.parametrize("inside", [True, False])
def test_autocast(inside):
    class Cast(Mlp):
        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(x)

    model, x = (Cast() if inside else Mlp()).eval(), torch.randn(4, 32)
    fast, backend = compiled(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=not inside):
        with pytest.warns(SparcWarning, match="autocast"):
            y = fast(x)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y, model(x))
    assert reasons(backend) == ["SPARC111"]


def test_a_size_that_is_read_from_a_tensor():
    class Counted(Mlp):
        def forward(self, x):
            return super().forward(x).nonzero()

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        assert refused(Counted().eval(), torch.randn(4, 32)) == ["SPARC111"]


def test_a_number_that_is_read_from_a_tensor():
    class Read(Mlp):
        def forward(self, x):
            return super().forward(x) * x.sum().item()

    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        assert refused(Read().eval(), torch.randn(4, 32)) == ["SPARC111"]


def test_control_flow():
    class Checkpointed(Mlp):
        def forward(self, x):
            return checkpoint(super().forward, x, use_reentrant=False)

    assert refused(Checkpointed().eval(), torch.randn(4, 32)) == ["SPARC111"]


def test_a_weight_that_is_not_finite():
    model = Mlp().eval()
    model.up.weight[0, 0] = torch.inf
    assert refused(model, torch.randn(4, 32)) == ["SPARC106"]


def test_a_fragment_without_weights_runs_as_it_is():
    fast, backend = compiled(lambda x: x.sin() + 1)
    x = torch.randn(3)
    assert torch.equal(fast(x), x.sin() + 1)
    assert [(fragment.compiled, len(fragment.diagnostics)) for fragment in backend.fragments] == [(False, 0)]


# weights that change --------------------------------------------------------------------------------------------------
def scale(model):
    model.up.weight.mul_(2)


def load(model):
    model.load_state_dict(Mlp().state_dict())


def swap(model):
    model.up.weight.data = torch.randn(64, 32)


def replace(model):
    model.up = nn.Linear(32, 64)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("change", [scale, load, swap, replace])
def test_changed_weights_are_compressed_anew(change, dynamic):
    model, x = Mlp().eval(), torch.randn(4, 32)
    fast, backend = compiled(model, dynamic=dynamic)
    before = fast(x)
    change(model)
    after = fast(x)
    torch.testing.assert_close(after, model(x))
    assert not torch.allclose(before, after)
    artifacts = [artifact for fragment in backend.fragments for artifact in fragment.artifacts]
    fast(x)
    assert artifacts == [artifact for fragment in backend.fragments for artifact in fragment.artifacts]


def test_weights_that_always_change_end_in_eager_torch(monkeypatch):
    monkeypatch.setattr("sparc.backend._MOST_COPIES", 2)
    model, x = Mlp().eval(), torch.randn(4, 32)
    fast, _ = compiled(model)
    fast(x)
    scale(model)
    fast(x)
    scale(model)
    with pytest.warns(SparcWarning, match="SPARC113"):
        y = fast(x)
    torch.testing.assert_close(y, model(x))


# options and registration ---------------------------------------------------------------------------------------------
def test_the_entry_point_is_the_backend():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"]["torch_dynamo_backends"]["sparc"].partition(":")
    assert getattr(import_module(module), name) is compile_fragment


def test_options_come_with_torch_compile():
    model, x, found = Mlp().eval(), torch.randn(4, 32), []
    options = {"recipe": "w4", "target": "reference", "verify": "sample", "fragments": found}
    fast = torch.compile(model, backend=compile_fragment, options=options)
    assert signal(model(x), fast(x)) > 10
    encodings = Counter(row.encoding for row in found[0].artifacts[0].ledger.sites)
    assert any("bits=4" in encoding for encoding in encodings)
    assert "2 of 2 weights compressed" in str(found[0].artifacts[0].report)


@pytest.mark.parametrize(
    ("options", "code"),
    [({"recipes": "w8"}, "SPARC209"), ({"recipe": "w9"}, "SPARC201"), ({"target": "tpu"}, "SPARC201"),
     ({"verify": "never"}, "SPARC209"), ({"options": {"opset": 3}}, "SPARC407")],
)  # fmt: skip
def test_wrong_options_are_errors(options, code):
    fast = torch.compile(Mlp().eval(), backend=compile_fragment, options=options)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed) as raised:
        fast(torch.randn(4, 32))
    assert isinstance(raised.value.inner_exception, SparcError)
    assert raised.value.inner_exception.code == code


@pytest.mark.parametrize(
    ("source", "name"),
    [("L['self']._modules['fc']._parameters['weight']", "fc.weight"), ("L['x']", "x"), ("L['self'].k", "k"),
     ("L['kwargs']['mask']", "mask"), ("G['model']._modules['0']._buffers['mean']", "0.mean"),
     ("L['past'].layers[0].keys", "layers.0.keys")],
)  # fmt: skip
def test_names_are_the_users(source, name):
    assert user_name(source) == name


# generation -----------------------------------------------------------------------------------------------------------
def llama():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize(("recipe", "target"), [("dense", "reference"), ("dense", "onnx"), ("w8", "onnx")])
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
