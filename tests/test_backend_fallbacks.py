"""torch.compile with the backend sparc: what runs in eager torch and why, weights that change, options."""

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
from sparc.backend import compile_fragment
from sparc.dynamo import user_name
from tests.backends import Mlp, compiled, fresh_dynamo, reasons, refused, signal

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def fresh():
    with fresh_dynamo():
        yield


# eager torch, with a reason -------------------------------------------------------------------------------------------
class Cached(Mlp):
    def forward(self, x, cache):
        cache[: x.shape[0]] = x
        return super().forward(x) + cache.sum()


class Dropped(Mlp):
    def forward(self, x):
        return F.dropout(super().forward(x), training=True)


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
    with torch.enable_grad(), pytest.warns(SparcWarning, match=r"SPARC114[\s\S]*no_grad"):
        fast(x).sum().backward()
    assert model.up.weight.grad is not None
    assert reasons(backend) == ["SPARC114"]
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


def test_a_type_that_the_runtime_lacks():
    assert refused(Mlp().eval().bfloat16(), torch.randn(4, 32).bfloat16(), recipe="w8", target="onnx") == ["SPARC406"]


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
    fast, backend = compiled(model, recipe="w8", dynamic=dynamic)
    before = fast(x)
    change(model)
    after = fast(x)
    assert signal(model(x), after) > 30
    assert signal(before, after) < 10
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
    with pytest.warns(SparcWarning, match="SPARC115"):
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
