"""Levels: the algebra of the maps, weights known by hand, functions that must be preserved, interpolation."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sparc
from sparc.capture import capture
from sparc.diag import PassError
from sparc.pass_base import PassContext
from sparc.passes.canonicalize import Canonicalize
from sparc.passes.levels.maps import AxisMap, Part
from sparc.verify import relative_error
from tests.architectures import ARCHITECTURES
from tests.passes.level_models import IDS, Decoder, Layer, decoder


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


# maps ----------------------------------------------------------------------------------------------------------------
parts = st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3), st.booleans()), min_size=1, max_size=3)


@given(parts, st.integers(2, 4))
def test_averages_undo_copies(described, width):
    """F T = I, T has one 1 in each row, F averages, and a contraction takes the transposes."""
    sizes = [Part(width * units * inner, width * units if merged else 0) for units, inner, merged in described]
    total = sum(part.size for part in sizes)
    written, contracted = (AxisMap(0, kind, tuple(sizes), width) for kind in (False, True))
    average, copies = written.coalesce(torch.eye(total)), written.decoalesce(torch.eye(written.coarse_size))
    assert torch.allclose(average @ copies, torch.eye(written.coarse_size).double(), atol=1e-12)
    assert torch.allclose(average.sum(1), torch.ones(written.coarse_size).double())
    assert torch.equal(copies.sum(1), torch.ones(total).double())
    assert torch.equal(copies.max(1).values, torch.ones(total).double())
    assert torch.equal(contracted.coalesce(torch.eye(total)), copies.T)
    assert torch.allclose(contracted.decoalesce(torch.eye(written.coarse_size)), average.T)


def test_units_stay_together():
    heads = AxisMap(0, False, (Part(8, 4),), 2)  # four heads of two features: 0 with 2, 1 with 3
    assert heads.coalesce(torch.arange(8.0)).tolist() == [2, 3, 4, 5]
    assert heads.decoalesce(torch.tensor([1.0, 2, 3, 4])).tolist() == [1, 2, 3, 4, 1, 2, 3, 4]


# programs ----------------------------------------------------------------------------------------------------------
def architecture(name, auto=None, **options):
    found = ARCHITECTURES[name]
    built = replace(found, auto=auto or found.auto, options={**found.options, **options}).build()
    program = capture(built.model, built.inputs, dynamic=built.dynamic)
    Canonicalize().run(program, PassContext())
    program.sweep()
    return program, program.main.signature.bind((), dict(built.inputs))


def randomized(program):
    """The program with other weights, such as training gives."""
    generator = torch.Generator().manual_seed(1)
    result = program.clone()
    for name, tensor in program.weights.items():
        if tensor.is_floating_point() and "inv_freq" not in name:
            noise = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
            result.set_weight(name, tensor + 0.3 * noise)
    return result


def same_weights(a, b):
    return set(a.weights) == set(b.weights) and all(torch.equal(a.weights[name], b.weights[name]) for name in a.weights)


def worst(a, b, flat):
    pairs = zip(a.run_flat(flat, wide=True), b.run_flat(flat, wide=True), strict=True)
    return max(relative_error(x, y) for x, y in pairs)


# coalescing ----------------------------------------------------------------------------------------------------------
def test_the_weights_of_a_coarser_level():
    """Every weight against matrices written out by hand."""
    program = decoder()
    small, _ = sparc.coalesce(program)

    def average(units, inner):
        half = torch.eye(units // 2, dtype=torch.float64)
        return torch.kron(torch.cat([half, half], 1) / 2, torch.eye(inner, dtype=torch.float64))

    residual, hidden = average(16, 1), average(24, 1)
    queries, keys = average(2, 8), average(2, 4)  # whole groups of heads: two units
    qkv = torch.block_diag(queries, keys, keys)
    copies = {id(each): 2 * each.T for each in (residual, hidden, queries)}
    maps = {
        "norm1.weight": (residual,), "norm1.bias": (residual,), "norm2.weight": (residual,), "norm2.bias": (residual,),
        "qkv.weight": (qkv, residual), "qkv.bias": (qkv,), "out.weight": (residual, queries),
        "gate.weight": (hidden, residual), "gate.bias": (hidden,),
        "up.weight": (hidden, residual), "up.bias": (hidden,),
        "down.weight": (residual, hidden), "down.bias": (residual,),
    }  # fmt: skip
    for index in (0, 2):
        for role, (out, *inner) in maps.items():
            pair = (program.weights[f"layers.{index + step}.{role}"].double() for step in (0, 1))
            expected = out @ sum(pair) / 2
            expected = expected @ copies[id(inner[0])] if inner else expected
            assert torch.allclose(small.weights[f"layers.{index}.{role}"].double(), expected, atol=1e-7), role
    for name in ("tokens.weight", "positions"):
        assert torch.allclose(small.weights[name].double(), program.weights[name].double() @ residual.T, atol=1e-7)
    assert torch.allclose(small.weights["norm.weight"].double(), residual @ program.weights["norm.weight"].double())
    assert len(small.weights) == len(maps) * 2 + 4


def test_the_text_of_a_coarser_level(golden):
    program = decoder(2)
    golden("levels_coalesced.txt", f"{program.text()}\n{sparc.coalesce(program)[0].text()}")


def test_layers_of_an_odd_number():
    program = decoder(5)
    small, level = sparc.coalesce(program, width=1)
    assert {name.split(".")[1] for name in small.weights if name.startswith("layers")} == {"0", "2", "4"}
    assert torch.equal(small.weights["layers.4.up.weight"], program.weights["layers.4.up.weight"])
    grown = sparc.decoalesce(small, level)
    assert same_weights(sparc.coalesce(grown, width=1)[0], small)
    assert torch.equal(grown.weights["layers.3.up.weight"], small.weights["layers.2.up.weight"])


def test_shared_layers_stay_shared():
    torch.manual_seed(0)
    layer = Layer()
    small, level = sparc.coalesce(capture(Decoder(layer, layer, layer, layer).eval(), (IDS,)), width=1)
    assert sum(name.startswith("layers") for name in small.weights) == 13
    assert torch.equal(small.weights["layers.0.up.weight"], layer.up.weight)
    assert same_weights(sparc.decoalesce(small, level), small)


def test_two_levels():
    torch.manual_seed(0)
    program = capture(Decoder(*[Layer(8, 4) for _ in range(4)]).eval(), (IDS,))
    middle, first = sparc.coalesce(program)
    small, second = sparc.coalesce(middle)
    small = randomized(small)
    grown = sparc.decoalesce(small, second)
    assert same_weights(sparc.coalesce(sparc.coalesce(sparc.decoalesce(grown, first))[0])[0], small)
    narrow, _ = sparc.coalesce(middle, depth=1)
    with pytest.raises(PassError, match="cannot be merged by 2"):
        sparc.coalesce(narrow)  # a single head of keys is left


def test_half_precision_is_rounded_once():
    program = decoder(2)
    half = program.clone()
    for name, tensor in program.weights.items():
        half.set_weight(name, tensor.to(torch.bfloat16))
    name = "layers.0.up.weight"
    expected = torch.stack([half.weights[f"layers.{i}.up.weight"].double() for i in (0, 1)]).mean(0).to(torch.bfloat16)
    for entry, node in half.nodes():
        if node.op == "call_function":
            entry.infer(node)
    assert torch.equal(sparc.coalesce(half, width=1)[0].weights[name], expected)


# decoalescing --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("width", [2, 1])
@pytest.mark.parametrize("depth", [2, 1])
def test_coalescing_undoes_decoalescing(width, depth):
    small, level = sparc.coalesce(decoder(), width, depth)
    small = randomized(small)
    grown = sparc.decoalesce(small, level)
    again, _ = sparc.coalesce(grown, width, depth)
    assert same_weights(again, small)
    assert again.text() == small.text()


def test_features_keep_the_function():
    small, level = sparc.coalesce(decoder(), depth=1)
    small = randomized(small)
    assert worst(small, sparc.decoalesce(small, level), [IDS]) < 1e-12


ARCHITECTURES_WITH_HEADS = {
    "gpt2": None,  # tied, one matrix for queries, keys and values
    "llama": None,  # grouped queries, rotary
    "gpt_neox": None,  # queries, keys and values of a head are neighbours
    "qwen3": None,  # norms inside heads
    "cohere": None,  # rotary by interleaving, branches in parallel, tied
    "bert": "AutoModelForMaskedLM",  # norms behind the additions, masks
    "vit": "AutoModelForImageClassification",  # a convolution, an extra token
}


@pytest.mark.parametrize(
    ("name", "auto"),
    [
        pytest.param(*each, marks=pytest.mark.slow if each[0] in ("gpt_neox", "qwen3") else ())
        for each in ARCHITECTURES_WITH_HEADS.items()
    ],
)
def test_features_of_an_architecture_keep_the_function(name, auto):
    program, flat = architecture(name, auto)
    small, level = sparc.coalesce(program, depth=1)
    small = randomized(small)
    grown = sparc.decoalesce(small, level)
    assert worst(small, grown, flat) < 1e-9
    assert same_weights(sparc.coalesce(grown, depth=1)[0], small)
    assert small.weights.nbytes < 0.4 * program.weights.nbytes


def test_identical_heads_and_layers_are_merged_without_loss():
    small, level = sparc.coalesce(randomized(decoder()), depth=1)
    twins = sparc.decoalesce(small, level)  # every head and every feature has a twin
    assert worst(twins, sparc.coalesce(twins, depth=1)[0], [IDS]) < 1e-12
    torch.manual_seed(0)
    layer, program = Layer(), decoder(4)
    for name, tensor in layer.state_dict().items():
        for index in range(4):
            program.set_weight(f"layers.{index}.{name}", tensor)
    merged, _ = sparc.coalesce(program, width=1)
    assert all(torch.equal(merged.weights[f"layers.2.{name}"], tensor) for name, tensor in layer.state_dict().items())


def test_three_features_become_one():
    program = architecture("llama", hidden_size=24, intermediate_size=48, num_attention_heads=6, num_key_value_heads=3)
    small, level = sparc.coalesce(program[0], width=3, depth=1)
    small = randomized(small)
    assert worst(small, sparc.decoalesce(small, level), program[1]) < 1e-6  # a third is rounded to float32


def test_a_tied_head_multiplies_its_input():
    small, level = sparc.coalesce(decoder(), depth=1)
    (head,) = [node for node in small.graph.nodes if node.target is torch.ops.aten.mul.Tensor and node.args[1] == 2.0]
    assert next(iter(head.users)).args[1].target == "tokens.weight"
    grown = sparc.decoalesce(small, level)
    assert worst(small, grown, [IDS]) < 1e-12
    head.update_arg(1, 1.0)
    assert worst(small, grown, [IDS]) > 0.1


@pytest.mark.parametrize("wrong", ["rows summed", "columns averaged"])
def test_wrong_maps_change_the_function(wrong):
    small, level = sparc.coalesce(decoder(), depth=1)
    name, index = {"rows summed": ("layers.1.up.weight", 0), "columns averaged": ("layers.1.down.weight", 1)}[wrong]
    axes = list(level.axes[name])
    axes[index] = replace(axes[index], contracted=not axes[index].contracted)
    other = replace(level, axes={**level.axes, name: tuple(axes)})
    assert worst(small, sparc.decoalesce(small, other), [IDS]) > 1e-3


# interpolation -------------------------------------------------------------------------------------------------------
def test_interpolation_has_its_ends():
    big = decoder()
    grown = randomized(big)
    assert same_weights(sparc.interpolate(big, grown, 0), big)
    assert same_weights(sparc.interpolate(big, grown, 1), grown)
    name = "layers.1.up.weight"
    expected = 0.75 * big.weights[name].double() + 0.25 * grown.weights[name].double()
    assert torch.equal(sparc.interpolate(big, grown, 0.25).weights[name], expected.float())


def test_wrong_partners_are_refused():
    big = decoder()
    small, level = sparc.coalesce(big)
    for call in (
        lambda: sparc.interpolate(big, small, 0.5),
        lambda: sparc.decoalesce(big, level),
        lambda: sparc.decoalesce(decoder(1), level),
    ):
        with pytest.raises(PassError, match="SPARC220"):
            call()
    for alpha in (-0.1, 1.5):
        with pytest.raises(PassError, match="SPARC209"):
            sparc.interpolate(big, big, alpha)
