"""Attention over a cache: which operator carries it, and that it computes what the program computes for any mask."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparc
from examples.models import smollm2
from sparc.artifact import Artifact
from sparc.cache import Cache, CacheSlot
from sparc.capture import capture
from sparc.codegen.onnx.emission import OnnxEmission
from sparc.codegen.onnx.runtime import OnnxRunner
from sparc.codegen.onnx.store import stored_name
from sparc.codegen.onnx.target import OnnxTarget
from sparc.target import EmitContext
from tests.codegen.decoders import call, calls, compiled, tiny
from tests.codegen.emitting import assert_agrees, operators

GROUPED = ("llama", "mistral", "gpt2", pytest.param("phi", marks=pytest.mark.slow))


def emission_of(artifact: Artifact) -> OnnxEmission:
    found = artifact.emission
    assert isinstance(found, OnnxEmission)
    return found


def assert_equal(artifact: Artifact) -> None:
    """The emission computes what the program computes, under every mask."""
    for name, inputs in calls(artifact):
        try:
            assert_agrees(artifact.program, emission_of(artifact), inputs, tolerance=4e-6)
        except AssertionError as error:
            raise AssertionError(name) from error


@pytest.mark.parametrize("name", GROUPED)
def test_a_proved_mask_gives_the_operator_that_appends_to_the_cache(name: str) -> None:
    artifact = compiled(name)
    found = operators(emission_of(artifact))
    assert found.count("GroupQueryAttention") == 2
    assert "Attention" not in found
    assert_equal(artifact)


def test_a_window_is_the_operators_own() -> None:
    artifact = compiled("mistral")
    nodes = emission_of(artifact).models["forward"].graph.node
    windows = [a.i for node in nodes for a in node.attribute if a.name == "local_window_size"]
    assert windows == [6, 6]


def test_portable_files_hold_standard_operators_only() -> None:
    artifact = compiled("llama", target="onnx:portable")
    assert {node.domain for node in emission_of(artifact).models["forward"].graph.node} == {""}
    assert_equal(artifact)


def test_sizes_come_from_the_mask_not_from_the_cache() -> None:
    """A cache may be longer than what it holds: nothing but the attention may read it."""
    artifact = compiled("llama")
    graph = emission_of(artifact).models["forward"].graph
    past = {value.name for value in graph.input if value.name.startswith("past_key_values")}
    readers = {node.op_type for node in graph.node if past & set(node.input)}
    assert readers == {"GroupQueryAttention"}


class Step(nn.Module):
    """Attention over a cache, under a mask that a function makes of the padding and of places.

    Queries, keys and values are pieces of one product, which has `more` columns behind them.
    """

    def __init__(self, mask: Any, more: int = 0) -> None:
        super().__init__()
        self.qkv, self.mask = nn.Linear(32, 96 + more), mask

    def forward(self, input_ids: Tensor, attention_mask: Tensor, key: Tensor, value: Tensor) -> Any:
        batch, new, _ = input_ids.shape
        q, k, v = (each.view(batch, new, 2, 16).transpose(1, 2) for each in self.pieces(input_ids))
        k, v = torch.cat([key, k], 2), torch.cat([value, v], 2)
        queries = torch.arange(new)[:, None] + key.shape[2]
        mask = self.mask(queries, torch.arange(k.shape[2]), attention_mask[:, None, None, :] != 0)
        y = nn.functional.scaled_dot_product_attention(q, k, v, mask)
        return {"y": y.transpose(1, 2).reshape(batch, new, 32), "grown.key": k, "grown.value": v}

    def pieces(self, x: Tensor) -> list[Tensor]:
        rows = self.qkv(x)
        return [rows[..., start : start + 32] for start in (0, 32, 64)]


UNPROVED = {
    "forwards": lambda q, k, padding: (k >= q) & padding,
    "shifted": lambda q, k, padding: (k <= q - 1) & padding,
    "strided": lambda q, k, padding: (k <= q) & (k * 2 >= q) & padding,
    "hidden twice": lambda q, k, padding: (k <= q) & padding & padding.flip(-1),
    "numbers": lambda q, k, padding: torch.where((k <= q) & padding, 0.0, -1e4),
    "not causal": lambda q, k, padding: padding.expand(-1, -1, q.shape[0], -1),
}
PROVED = {
    "causal": lambda q, k, padding: (k <= q) & padding,
    "without padding": lambda q, k, padding: (k <= q)[None, None],
    "window": lambda q, k, padding: padding & (q - 3 < k) & (q >= k),
}


def step(mask: Any, more: int = 0) -> tuple[list[str], list[str], list[str]]:
    """The operators of a step under a mask, equal to the program, the reasons of remarks, and what attention reads."""
    torch.manual_seed(0)
    inputs = {
        "input_ids": torch.randn(2, 3, 32), "attention_mask": torch.tensor([[0] + [1] * 7, [1] * 5 + [0, 1, 1]]),
        "key": torch.randn(2, 2, 5, 16), "value": torch.randn(2, 2, 5, 16),
    }  # fmt: skip
    past = {0: "batch", 2: "past"}
    dynamic = {
        "input_ids": {0: "batch", 1: "new"}, "attention_mask": {0: "batch", 1: "total"}, "key": past, "value": past
    }  # fmt: skip
    program = capture(Step(mask, more).eval(), inputs, dynamic=dynamic)
    program.main.cache = Cache((CacheSlot("key", "grown.key"), CacheSlot("value", "grown.value")), 64)
    context = EmitContext()
    emission = OnnxTarget("cpu").emit(program, context)
    assert_agrees(program, emission, list(inputs.values()), tolerance=4e-6)
    (fused,) = (node for node in emission.models["forward"].graph.node if node.op_type.endswith("Attention"))
    return operators(emission), [each.why for each in context.diagnostics], list(fused.input)


@pytest.mark.parametrize("mask", UNPROVED.values(), ids=UNPROVED)
def test_other_masks_are_not_taken_for_causal_ones(mask: Any) -> None:
    found, reasons, _ = step(mask)
    assert "Attention" in found
    assert len(reasons) == 1
    assert reasons[0].startswith("its mask is")
    assert "GroupQueryAttention" not in found


@pytest.mark.parametrize("mask", PROVED.values(), ids=PROVED)
def test_causal_masks_are_proved(mask: Any) -> None:
    found, reasons, _ = step(mask)
    assert not reasons
    assert "GroupQueryAttention" in found


@pytest.mark.parametrize(("more", "packed"), [(0, True), (32, False)])
def test_a_product_is_packed_where_it_is_nothing_else(more: int, packed: bool) -> None:
    _, _, inputs = step(PROVED["causal"], more)
    assert (inputs[1:3] == ["", ""]) == packed


def test_the_rotation_takes_any_positions() -> None:
    """Positions are an input: a prompt may start anywhere, and rows of a batch at different places."""
    artifact = compiled("llama")
    inputs = call(artifact, [[1] * 6, [0, 0, 1, 1, 1, 1]], 6)
    inputs[2] = torch.tensor([[4, 9, 2, 30, 31, 7], [0, 5, 3, 3, 8, 1]])
    assert_agrees(artifact.program, emission_of(artifact), inputs, tolerance=4e-6)


def test_logits_to_keep_may_be_left_out() -> None:
    """The file has a default for it, the last token; any number of places can be given."""
    artifact = compiled("llama")
    runner = emission_of(artifact).runner(threads=1)
    assert isinstance(runner, OnnxRunner)
    names = artifact.program.main.signature.input_names
    inputs = call(artifact, [[1] * 7], 5)
    (want,) = artifact.program.run_flat(inputs)[:1]
    feeds = {name: each.numpy() for name, each in zip(names, inputs, strict=True) if name != "logits_to_keep"}
    (last,) = runner.session.run(["logits"], feeds)
    torch.testing.assert_close(torch.from_numpy(last), want[:, -1:], rtol=1e-5, atol=1e-6)
    for places in ([0], [1, 4], [4, 3, 2, 1, 0, 0]):
        (some,) = runner.session.run(["logits"], {**feeds, "logits_to_keep": torch.tensor(places).numpy()})
        torch.testing.assert_close(torch.from_numpy(some), want[:, places], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("recipe", ["w8", pytest.param("w4", marks=pytest.mark.slow)])
def test_a_head_and_its_embedding_read_one_tensor(recipe: str) -> None:
    """Entries with a cache multiply codes by blocks; rows are looked up in the same codes, scales and zero points."""
    artifact = compiled("gpt2", recipe)
    emission = emission_of(artifact)
    graph = emission.models["forward"].graph
    assert {node.op_type for node in graph.node if node.domain == "com.microsoft"} >= {"MatMulNBits"}
    (lookup,) = (node for node in graph.node if node.op_type == "GatherBlockQuantized")
    head = next(node for node in graph.node if "logits" in node.output)
    stored = [stored_name(name) for name in (lookup.input[0], lookup.input[2])]
    assert stored == [stored_name(name) for name in head.input[1:3]]
    levels = [a.i for node in graph.node for a in node.attribute if a.name == "accuracy_level"]
    assert levels == [4] * 9
    assert_equal(artifact)


def test_one_product_is_cut_and_rotated_by_the_operator() -> None:
    """With compressed weights, which are stacked; the angles are made in the graph for any positions."""
    artifact = compiled("llama", "w8")
    graph = emission_of(artifact).models["forward"].graph
    fused = [node for node in graph.node if node.op_type == "GroupQueryAttention"]
    assert [list(node.input[1:3]) for node in fused] == [["", ""]] * 2
    assert [a.i for node in fused for a in node.attribute if a.name == "do_rotary"] == [1, 1]
    assert "RotaryEmbedding" not in operators(emission_of(artifact))
    assert_equal(artifact)


def test_rows_that_would_be_rotated_wrongly_are_refused() -> None:
    """It rotates a prompt's sequences alike: the file refuses others, and the runner takes them one by one."""
    artifact = compiled("llama", "w8")
    runner = emission_of(artifact).runner(threads=1)
    assert isinstance(runner, OnnxRunner)
    alike = call(artifact, [[1] * 6, [1, 0, 1, 1, 1, 1]], 6)
    alike[2] = torch.tensor([[7, 2, 9, 4, 5, 30]]).expand(2, -1).contiguous()
    names = artifact.program.main.signature.input_names
    want = artifact.program.run_flat(alike)[0]
    (got,) = runner.session.run(["logits"], {name: each.numpy() for name, each in zip(names, alike, strict=True)})
    torch.testing.assert_close(torch.from_numpy(got), want, rtol=1e-5, atol=1e-6)
    for place in range(6):
        other = [*alike[:2], alike[2].clone(), *alike[3:]]
        other[2][1, place] += 1
        with pytest.raises(Exception, match="position_ids"):
            runner.session.run(["logits"], {name: each.numpy() for name, each in zip(names, other, strict=True)})
        assert_agrees(artifact.program, emission_of(artifact), other, tolerance=4e-6)


def test_every_site_of_stacked_products_is_compared() -> None:
    """What reads a stacked product reads sizes too, which no site's own program can be given."""
    sparc.compile(tiny("llama"), task="text-generation", recipe="w8", target="onnx", measure=False, verify="full")


@pytest.mark.models
@pytest.mark.slow
def test_smollm2_with_a_cache_is_as_small_as_a_graph_made_by_hand() -> None:
    """Twelve operators a layer, and the angles, the mask and the ends once."""
    from transformers import LlamaForCausalLM

    whole = smollm2.load()
    with torch.device("meta"):
        causal = LlamaForCausalLM(whole.model.config)
    causal.model, causal.lm_head = whole.model, whole.lm_head
    options: Any = {"recipe": "w8", "measure": False, "verify": "types"}
    artifact = sparc.compile(causal.eval(), task="text-generation", **options)
    found = operators(emission_of(artifact))
    assert len(found) <= 400
    assert found.count("GroupQueryAttention") == 30
    assert found.count("MatMulNBits") == 5 * 30 + 1
    assert found.count("GatherBlockQuantized") == 1
