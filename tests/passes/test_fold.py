"""Folding batch norms: every layer kind, both sides, and every reason to leave one alone."""

import pytest
import torch
from torch import nn

from sparc.capture import capture
from sparc.driver import Driver
from sparc.pass_base import Samples
from sparc.passes.fold import fold_batch_norm, fold_batch_norm_before
from sparc.testing import assert_mutants_caught, assert_pass


def trained(norm):
    """A batch norm with statistics that matter."""
    with torch.no_grad():
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        if norm.affine:
            norm.weight.normal_()
            norm.bias.normal_()
    return norm


def run(model, x, step, verify="full"):
    torch.manual_seed(0)
    program = capture(model, (x,))
    driver = Driver(program, Samples({"forward": [[x]]}), verify=verify)
    row = driver.run(step)
    return driver.program, row


def operators(program):
    return [node.target._opname for node in program.graph.nodes if node.op == "call_function"]


AFTER = {
    "conv1d": (nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6), (2, 4, 9)),
    "conv2d": (nn.Conv2d(4, 6, 3, padding=1, stride=2), nn.BatchNorm2d(6), (2, 4, 8, 8)),
    "conv2d same": (nn.Conv2d(4, 6, 3, padding="same"), nn.BatchNorm2d(6), (2, 4, 8, 8)),
    "conv3d": (nn.Conv3d(2, 4, 2), nn.BatchNorm3d(4), (2, 2, 4, 4, 4)),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), (2, 4, 8, 8)),
    "depthwise": (nn.Conv2d(4, 4, 3, groups=4, bias=False), nn.BatchNorm2d(4), (2, 4, 8, 8)),
    "no bias": (nn.Conv2d(4, 6, 1, bias=False), nn.BatchNorm2d(6), (2, 4, 8, 8)),
    "not affine": (nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6, affine=False), (2, 4, 8, 8)),
    "transposed 1d": (nn.ConvTranspose1d(4, 6, 3), nn.BatchNorm1d(6), (2, 4, 9)),
    "transposed 2d": (nn.ConvTranspose2d(4, 6, 3, groups=2, stride=2, bias=False), nn.BatchNorm2d(6), (2, 4, 5, 5)),
    "transposed 3d": (nn.ConvTranspose3d(2, 3, 2), nn.BatchNorm3d(3), (2, 2, 4, 4, 4)),
    "linear": (nn.Linear(5, 7), nn.BatchNorm1d(7), (4, 5)),
    "linear no bias": (nn.Linear(5, 7, bias=False), nn.BatchNorm1d(7), (4, 5)),
}


@pytest.mark.parametrize("case", AFTER)
def test_folds_into_the_layer_before(case):
    layer, norm, shape = AFTER[case]
    model = nn.Sequential(layer, trained(norm)).eval()
    program, row = run(model, torch.randn(shape), fold_batch_norm)
    assert len(operators(program)) == 1
    assert row.measured["region, float64"] < 1e-12
    assert set(program.weights) == {"0.weight", "0.bias"}


BEFORE = {
    "conv1d": (nn.BatchNorm1d(4), nn.Conv1d(4, 6, 3), (2, 4, 9)),
    "conv2d": (nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, stride=2), (2, 4, 8, 8)),
    "grouped": (nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, groups=2, bias=False), (2, 4, 8, 8)),
    "valid": (nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, padding="valid"), (2, 4, 8, 8)),
    "linear": (nn.BatchNorm1d(5), nn.Linear(5, 7), (4, 5)),
}


@pytest.mark.parametrize("case", BEFORE)
def test_folds_into_the_layer_behind(case):
    norm, layer, shape = BEFORE[case]
    model = nn.Sequential(trained(norm), layer).eval()
    program, row = run(model, torch.randn(shape), fold_batch_norm_before)
    assert len(operators(program)) == 1
    assert row.measured["region, float64"] < 1e-12


def test_a_shiftless_norm_folds_into_padding_and_transposed_layers():
    norm = trained(nn.BatchNorm2d(4))
    with torch.no_grad():
        norm.running_mean.zero_()
        norm.bias.zero_()
    for layer in (nn.Conv2d(4, 6, 3, padding=1), nn.ConvTranspose2d(4, 6, 3, groups=2, padding=1)):
        program, row = run(nn.Sequential(norm, layer).eval(), torch.randn(2, 4, 6, 6), fold_batch_norm_before)
        assert len(operators(program)) == 1
        assert row.measured["region, float64"] < 1e-12


class TwoUses(nn.Module):
    def __init__(self, share):
        super().__init__()
        self.conv, self.norm, self.share = nn.Conv2d(4, 4, 1), trained(nn.BatchNorm2d(4)), share

    def forward(self, x):
        y = self.conv(x)
        return self.norm(y) + (y if self.share == "output" else self.conv(x + 1))


def left_alone(model, x, step=fold_batch_norm):
    _, row = run(model.eval(), x, step)
    assert row.changed == 0
    return row.skips[0].why


def test_reasons_to_leave_it_alone():
    x = torch.randn(2, 4, 6, 6)
    assert "also read by" in left_alone(TwoUses("output"), x)
    assert "weight is used more than once" in left_alone(TwoUses("weight"), x)
    batch = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False))
    assert "statistics of its batch" in left_alone(batch, x)
    rows = nn.Sequential(nn.Linear(5, 7), trained(nn.BatchNorm1d(3)))
    assert "not the linear layer's features" in left_alone(rows, torch.randn(2, 3, 5))
    padded = nn.Sequential(trained(nn.BatchNorm2d(4)), nn.Conv2d(4, 4, 3, padding=1))
    assert "pads with zeros" in left_alone(padded, x, fold_batch_norm_before)
    transposed = nn.Sequential(trained(nn.BatchNorm2d(4)), nn.ConvTranspose2d(4, 4, 3))
    assert "pads with zeros" in left_alone(transposed, x, fold_batch_norm_before)


@pytest.mark.parametrize("step", [fold_batch_norm, fold_batch_norm_before], ids=lambda step: step.name)
def test_the_contract_kit_and_wrong_twins(step):
    layers = [nn.Conv2d(4, 6, 3), trained(nn.BatchNorm2d(6))]
    if step is fold_batch_norm_before:
        layers = [trained(nn.BatchNorm2d(4)), nn.Conv2d(4, 6, 3)]
    model, x = nn.Sequential(*layers).eval(), torch.randn(2, 4, 8, 8)
    assert_pass(step, model, (x,), dynamic={"input": {0: "batch"}})
    assert "ScaledConstant" in assert_mutants_caught(step, model, (x,))


@pytest.mark.parametrize("case", ["conv2d", "grouped", "no bias", "transposed 1d", "linear"])
def test_weights_are_those_of_torchs_own_fusion(case):
    layer, norm, shape = AFTER[case]
    program, _ = run(nn.Sequential(layer, trained(norm)).eval(), torch.randn(shape), fold_batch_norm)
    if case == "linear":
        fused = nn.utils.fusion.fuse_linear_bn_eval(layer.eval(), norm.eval())
    else:
        fused = nn.utils.fusion.fuse_conv_bn_eval(layer.eval(), norm.eval(), transpose=case == "transposed 1d")
    torch.testing.assert_close(program.weights["0.weight"], fused.weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(program.weights["0.bias"], fused.bias, rtol=1e-5, atol=1e-6)
