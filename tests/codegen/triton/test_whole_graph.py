"""What torch.compile will see of an emitted graph, traced without a GPU on tensors that only pretend to be on one."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import triton
from torch import nn
from torch._functorch.aot_autograd import aot_export_module
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget

import sparc
from sparc.codegen.triton.emission import module_of
from tests.codegen.triton.models import Experts, LanguageModel, build
from tests.codegen.triton.test_static import Hidden
from tests.codegen.triton.test_static import compiled as static
from tests.codegen.triton.test_target import compiled, emission


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> FakeTensorMode:
    """Triton believes in an H100, so that torch can ask it which arguments a kernel writes to."""
    driver = SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32))
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    return FakeTensorMode(allow_non_fake_inputs=True)


def pretend(module: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """The module with its buffers on a GPU that is not there."""
    with mode:
        for name, buffer in list(module.named_buffers()):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype, device="cuda"))
    return module


def test_every_site_is_a_kernel_that_the_compiler_sees(fake_gpu: FakeTensorMode) -> None:
    module = pretend(module_of(emission(compiled(LanguageModel)).lowered["forward"], "cpu"), fake_gpu)
    with fake_gpu:
        ids = torch.empty(1, 7, dtype=torch.int64, device="cuda")
        traced, _ = aot_export_module(module, [ids], trace_joint=False)
    calls = Counter(str(node.target) for node in traced.graph.nodes if node.op == "call_function")
    assert calls["triton_kernel_wrapper_functional"] == 5
    assert not any("linear" in name or "mm" in name.split(".") or "rms_norm" in name for name in calls)
    written = [node.kwargs["tensors_to_clone"] for node in traced.graph.nodes
               if str(node.target) == "triton_kernel_wrapper_functional"]  # fmt: skip
    assert all(names == ["y"] for names in written)
    outputs = next(node for node in traced.graph.nodes if node.op == "output").args[0]
    assert len(outputs) == 1


def test_codes_go_from_kernel_to_kernel(fake_gpu: FakeTensorMode) -> None:
    module = pretend(module_of(emission(static(Hidden)).lowered["forward"], "cpu"), fake_gpu)
    with fake_gpu:
        traced, _ = aot_export_module(module, [torch.empty(7, 200, device="cuda")], trace_joint=False)
    made = [node.meta["val"] for node in traced.graph.nodes if "triton_kernel_wrapper" in str(node.target)]
    assert [each["y"].dtype for each in made] == [torch.uint8, torch.float32]


def test_every_operator_knows_its_type(fake_gpu: FakeTensorMode) -> None:
    module = pretend(module_of(emission(compiled(LanguageModel)).lowered["forward"], "cpu"), fake_gpu)
    with fake_gpu:
        result = module(torch.empty(1, 1, dtype=torch.int64, device="cuda"))[0]
    assert (result.shape, result.dtype, result.device.type) == ((1, 1, 100), torch.float16, "cuda")


class Sum(Experts):
    """The sum of all experts' results."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = nn.functional.silu(torch.matmul(x, self.gate)) * torch.matmul(x, self.up)
        return torch.baddbmm(self.bias.unsqueeze(1), inner, self.down).sum(0)


def test_stacked_experts_are_kernels_that_the_compiler_sees(fake_gpu: FakeTensorMode) -> None:
    model, x = build(Sum), torch.randn(5, 48).half()
    options = {"verify_kernels": False}
    artifact = sparc.compile(
        model, (x,), recipe="w4", target="cuda:sm_90", dynamic={"x": {0: "length"}}, options=options
    )
    module = pretend(module_of(emission(artifact).lowered["forward"], "cpu"), fake_gpu)
    with fake_gpu:
        x = torch.empty(7, 48, dtype=torch.float16, device="cuda")
        traced, _ = aot_export_module(module, [x], trace_joint=False)
    calls = Counter(str(node.target) for node in traced.graph.nodes if node.op == "call_function")
    assert calls["triton_kernel_wrapper_functional"] == 2
    assert not any("mm" in name for name in calls)
    (result,) = traced.graph.output_node().args[0]  # type: ignore[misc, union-attr]
    assert result.meta["val"].shape == (7, 48)


class Positions(nn.Module):
    """A model that makes a tensor on the device of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(48, 48)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + torch.arange(x.shape[0], device=x.device).unsqueeze(1)


def test_tensors_are_made_on_the_graphs_device() -> None:
    x = torch.randn(5, 48).half()
    options = {"verify_kernels": False}
    dynamic = {"x": {0: "length"}}
    artifact = sparc.compile(
        Positions().half(), (x,), recipe="w8", target="cuda:sm_90", dynamic=dynamic, options=options
    )
    module = module_of(emission(artifact).lowered["forward"], "meta")
    assert isinstance(module, torch.fx.GraphModule)
    devices = [node.kwargs["device"] for node in module.graph.nodes if "device" in node.kwargs]
    assert devices
    assert set(devices) == {torch.device("meta")}
