"""Programs as JSON and tensors: what is read back is the same program, and nothing malformed gets further than a
SPARC503.
"""

import copy
import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.export import Dim

from sparc import codes
from sparc.capture import capture, capture_entries
from sparc.diag import ArtifactError, SparcError
from sparc.encoding.int_grid import IntGrid
from sparc.encoding.operators import encode_weight, round_weight, spec_name
from sparc.encoding.parse import parse_spec
from sparc.program import Program
from sparc.serialize import TensorFile, TensorReader, program_from_dict, program_to_dict
from sparc.serialize.schema import from_json, to_json
from sparc.serialize.targets import target_from_text, target_to_text

Make = Callable[[], tuple[Program, list[Tensor]]]


def seeded(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(7))


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


class Mixed(nn.Module):
    """Sizes, constants, several results, nested outputs, a frozen flag."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 16)
        self.norm = nn.LayerNorm(16)

    def forward(self, x: Tensor, scale: float = 1.0, mask: Tensor | None = None) -> dict[str, Any]:
        batch, length, _ = x.shape
        y = self.norm(self.fc(x)).reshape(batch, length, 4, 4).transpose(1, 2)
        hidden = torch.full((length, length), float("-inf")).triu(1)
        position = torch.arange(length).expand(batch, length)
        first, second = torch.split(y * scale, 2, dim=1)
        return {"y": torch.cat([y, y], dim=2), "parts": Pair(first, second), "rest": [position, hidden]}


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1).to(memory_format=torch.channels_last)
        self.register_buffer("table", torch.arange(12.0).reshape(3, 4).t())

    def forward(self, image: Tensor) -> Tensor:
        y = torch.nn.functional.max_pool2d(self.conv(image).relu(), 2)
        return y.flatten(2) @ torch.ones(y.shape[2] * y.shape[3], 4) @ self.table


class DataDependent(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.nonzero(x > 0), x.reshape(-1, 4, x.shape[1]).sum(1)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embed(ids))


def mixed() -> tuple[Program, list[Tensor]]:
    torch.manual_seed(0)
    return capture(Mixed(), (seeded(2, 5, 8), 2.0), dynamic={"x": {0: "batch", 1: "seq"}}), [seeded(3, 7, 8)]


def frozen_infinity() -> tuple[Program, list[Tensor]]:
    torch.manual_seed(0)
    return capture(Mixed(), {"x": seeded(2, 5, 8), "scale": float("inf")}), [seeded(2, 5, 8)]


def convolutions() -> tuple[Program, list[Tensor]]:
    torch.manual_seed(0)
    return capture(Convolutions(), (seeded(2, 3, 4, 4),), dynamic={"image": {0: "batch"}}), [seeded(5, 3, 4, 4)]


def data_dependent() -> tuple[Program, list[Tensor]]:
    return capture(DataDependent(), (seeded(8, 5),), dynamic={"x": {0: 4 * Dim("k"), 1: "seq"}}), [seeded(12, 6)]


def tied() -> tuple[Program, list[Tensor]]:
    torch.manual_seed(0)
    ids = torch.tensor([[1, 2, 3]])
    shapes = {
        "one": {"example_inputs": (ids,)},
        "many": {"example_inputs": (ids,), "dynamic": {"ids": {0: "batch", 1: "seq"}}},
    }
    return capture_entries(Tied(), shapes), [ids]


def gridded() -> tuple[Program, list[Tensor]]:
    program, inputs = mixed()
    weight = program.weights["fc.weight"]
    grid = IntGrid(bits=4, group=4, symmetric=False).fit(weight)
    program.set_weight("fc.weight", round_weight(weight, grid), grid)
    return program, inputs


def encoded() -> tuple[Program, list[Tensor]]:
    """A weight encoded, and an activation quantized dynamically."""
    program, inputs = gridded()
    entry, weight = program.main, program.weights["fc.weight"]
    old = next(node for node in entry.graph.nodes if node.target == "fc.weight")
    linear = next(iter(old.users))
    grid = program.grid(old)
    assert grid is not None
    spec = spec_name(grid.spec)
    parts = [program.add_weight(f"fc.weight_{name}", part, old) for name, part in encode_weight(weight, grid).items()]
    dense = entry.call(torch.ops.sparc.decode.default, parts, spec, "matrix", [16, 8], torch.float32, before=linear)
    linear.replace_input_with(old, dense)
    per_token = spec_name(IntGrid())
    codes = entry.call(torch.ops.sparc.quantize.default, linear.args[0], [], per_token, before=linear)
    items = [entry.call(operator.getitem, codes, index, before=linear) for index in range(2)]
    value = entry.call(torch.ops.sparc.decode.default, items, per_token, "matrix", None, torch.float32, before=linear)
    linear.replace_input_with(linear.args[0], value)
    program.sweep()
    return program, inputs


PROGRAMS: list[Make] = [mixed, frozen_infinity, convolutions, data_dependent, tied, gridded, encoded]


def through_json(program: Program) -> Program:
    described = program_to_dict(program)
    content = to_json(described.program)
    read, _ = program_from_dict(from_json(content, "program.json"), described.tensors.__getitem__, parse_spec)
    assert to_json(program_to_dict(read).program) == content
    return read


# what comes back ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("make", PROGRAMS, ids=lambda make: make.__name__)
def test_a_program_comes_back_equal(make: Make) -> None:
    program, inputs = make()
    read = through_json(program)
    assert read.text() == program.text()
    assert read.weights.aliases == program.weights.aliases
    for name in program.weights:
        ours, theirs = program.weights.record(name), read.weights.record(name)
        assert (ours.origins, ours.trainable) == (theirs.origins, theirs.trainable)
    for name in program.entries:
        before, after = program.run_flat(inputs, entry=name), read.run_flat(inputs, entry=name)
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("make", PROGRAMS, ids=lambda make: make.__name__)
def test_module_paths_and_source_lines_come_back(make: Make) -> None:
    program, _ = make()
    for (_, ours), (_, theirs) in zip(program.nodes(), through_json(program).nodes(), strict=True):
        assert ours.name == theirs.name
        for key in ("module", "source", "type"):
            assert (ours.meta.get(key) or None) == (theirs.meta.get(key) or None)


def test_grids_come_back() -> None:
    program, _ = gridded()
    ours, theirs = program.grid("fc.weight"), through_json(program).grid("fc.weight")
    assert ours is not None
    assert theirs is not None
    assert (str(theirs.spec), theirs.view) == (str(ours.spec), ours.view)
    assert all(torch.equal(theirs.tensors[name], ours.tensors[name]) for name in ours.tensors)


def test_strides_of_weights_come_back(tmp_path: Path) -> None:
    program, _ = convolutions()
    described = program_to_dict(program)
    (tmp_path / "w.safetensors").write_bytes(b"".join(TensorFile(described.tensors).chunks()))
    with TensorReader(tmp_path / "w.safetensors") as reader:
        read, _ = program_from_dict(described.program, reader.get, parse_spec)
    assert program.weights["conv.weight"].is_contiguous(memory_format=torch.channels_last)
    for name, tensor in program.weights.items():
        assert read.weights[name].stride() == tensor.stride()
        assert torch.equal(read.weights[name], tensor)


def test_dynamic_dimensions_stay_dynamic_and_can_be_compiled_further() -> None:
    program, _ = mixed()
    read = through_json(program)
    batch, length, _ = read.main.placeholders[0].meta["val"].shape
    assert (str(batch), str(length)) != ("2", "5")
    assert (batch.node.hint, length.node.hint) == (2, 5)
    last = read.main.output.args[0][0]
    added = read.main.call(torch.ops.aten.relu.default, last, before=read.main.output)
    assert added.meta["val"].shape == last.meta["val"].shape


def test_nothing_of_this_machine_is_written(tmp_path: Path) -> None:
    program, _ = mixed()
    text = to_json(program_to_dict(program).program).decode()
    assert "test_serialize.py" in text
    assert str(Path(__file__).parent) not in text
    assert str(Path.cwd()) not in text
    assert str(Path.home()) + "/" not in text


# operators ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "name", ["aten.linear.default", "aten.__and__.Tensor", "sparc.decode.default", "operator.getitem", "torch.sym_max"]
)
def test_names_of_operators_round_trip(name: str) -> None:
    assert target_to_text(target_from_text(name)) == name


@pytest.mark.parametrize(
    "name",
    ["os.system", "builtins.eval", "builtins.exec", "operator.attrgetter", "operator.methodcaller", "torch.load",
    "aten.from_file.default",
     "aten.add_.Tensor", "aten.add.out", "aten.linear", "aten.linear.default.__call__", "aten.__class__.mro",
     "__class__.__init__.default", "load_library.x.default", "aten.no_such_operator.default",
     "no_such_library.add.default", "c10d.barrier.default", "prim.device.default", "", "a.b.c", "aten..default",
     "aten.linear.default\n"],
)  # fmt: skip
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ArtifactError) as caught:
        target_from_text(name)
    assert caught.value.code == "SPARC503"


def test_an_operator_of_a_registered_library_is_found() -> None:
    library = torch.library.Library("sparc_tests", "DEF")
    library.define("twice(Tensor x) -> Tensor")
    assert target_from_text("sparc_tests.twice.default") is torch.ops.sparc_tests.twice.default


def test_a_node_that_is_no_operator_is_not_written() -> None:
    program, _ = mixed()
    node = next(node for node in program.graph.nodes if node.op == "call_function")
    node.target = print
    with pytest.raises(ArtifactError) as caught:
        program_to_dict(program)
    assert caught.value.code == "SPARC508"


# malformed programs ---------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def written() -> tuple[dict[str, Any], dict[str, Tensor]]:
    described = program_to_dict(encoded()[0])
    return described.program, described.tensors


def entry_of(described: dict[str, Any]) -> dict[str, Any]:
    return described["entries"]["forward"]


def call_of(described: dict[str, Any], target: str) -> dict[str, Any]:
    return next(node for node in entry_of(described)["nodes"] if node.get("target") == target)


def deep(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


CHANGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "another version": lambda p: p.update(version=2),
    "an unknown key": lambda p: p.update(extra=1),
    "an unknown key of a node": lambda p: entry_of(p)["nodes"][-1].update(hook="x"),
    "an unknown key of a weight": lambda p: next(iter(p["weights"].values())).update(pickle="x"),
    "no entries": lambda p: p.update(entries={}),
    "entries that are a list": lambda p: p.update(entries=[]),
    "no signature": lambda p: entry_of(p).pop("signature"),
    "a node used before it is computed": lambda p: entry_of(p)["nodes"].reverse(),
    "two nodes of one name": lambda p: entry_of(p)["nodes"].append(entry_of(p)["nodes"][-1]),
    "an unknown operator": lambda p: call_of(p, "aten.linear.default").update(target="aten.linearr.default"),
    "a Python function": lambda p: call_of(p, "aten.linear.default").update(target="os.system"),
    "an argument that is an object": lambda p: call_of(p, "aten.linear.default").update(args=[{"eval": "1"}]),
    "an unknown dtype": lambda p: call_of(p, "sparc.decode.default")["args"].__setitem__(4, {"dtype": "Tensor"}),
    "an unknown encoding": lambda p: call_of(p, "sparc.decode.default")["args"].__setitem__(1, "Pickle()"),
    "a spec that is code": lambda p: call_of(p, "sparc.decode.default")["args"].__setitem__(1, "__import__('os')"),
    "a device elsewhere": lambda p: call_of(p, "aten.arange.default")["kwargs"].update(device={"device": "cuda"}),
    "arguments nested too deeply": lambda p: call_of(p, "aten.linear.default")["args"].append(deep(200)),
    "too few arguments": lambda p: call_of(p, "aten.linear.default").update(args=[]),
    "a wrong shape": lambda p: call_of(p, "aten.linear.default")["type"].update(shape=["s77", "s27", 17]),
    "a wrong dtype": lambda p: call_of(p, "aten.linear.default")["type"].update(dtype="float64"),
    "a negative size": lambda p: call_of(p, "aten.linear.default")["type"].update(shape=[-1]),
    "a huge size": lambda p: call_of(p, "aten.linear.default")["type"].update(shape=[2**70]),
    "an unknown symbol": lambda p: call_of(p, "aten.linear.default")["type"].update(shape=["s1000"]),
    "an unknown function": lambda p: call_of(p, "aten.linear.default")["type"].update(shape=[{"op": "eval", "args":
    []}]), "a tower of powers": lambda p: call_of(p, "aten.linear.default")["type"].update(shape=[{"op": "Pow", "args":
    [9, 10**9]}]), "an unknown weight": lambda p: entry_of(p)["nodes"][0].update(weight="nope"),
    "a missing tensor": lambda p: p["weights"]["fc.bias"].update(tensor="nope"),
    "another weight's tensor": lambda p: p["weights"]["fc.bias"].update(tensor="fc.weight_codes"),
    "a wrong shape of a weight": lambda p: p["weights"]["fc.bias"].update(shape=[17]),
    "a weight of rank 40": lambda p: p["weights"]["fc.bias"].update(shape=[1] * 40),
    "strides with holes": lambda p: p["weights"]["fc.bias"].update(stride=[100]),
    "overlapping strides": lambda p: p["weights"]["fc.bias"].update(stride=[0]),
    "a result too many": lambda p: entry_of(p)["results"].append({"node": "linear"}),
    "a result that is a number": lambda p: entry_of(p)["results"].__setitem__(0, 3),
    "an input too many": lambda p: entry_of(p)["signature"]["input_leaves"].append({"name": "z"}),
    "a symbol of no kind": lambda p: entry_of(p)["symbols"].update(s9={"kind": "magic"}),
    "a symbol that is code": lambda p: entry_of(p)["symbols"].update({"__import__('os')": {"kind": "size"}}),
    "names that are numbers": lambda p: entry_of(p).update(names={"s77": 3}),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_malformed_program_is_refused(change: Callable[[dict[str, Any]], Any], written: Any) -> None:
    described, tensors = copy.deepcopy(written[0]), written[1]
    change(described)

    def get(name: str) -> Tensor:
        if name not in tensors:
            raise ArtifactError(codes.ARTIFACT_MALFORMED, "no such tensor")
        return tensors[name]

    with pytest.raises(ArtifactError) as caught:
        program_from_dict(described, get, parse_spec)
    assert caught.value.code == "SPARC503"


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value inside nested JSON."""
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        found += places(item, (*path, key))
    return found


JUNK = st.sampled_from(
    [
        None,
        True,
        -1,
        0,
        3,
        2**63,
        1e300,
        "",
        "x",
        "s77",
        "linear",
        [],
        {},
        [1],
        {"node": "x"},
        {"op": "Mul", "args": []},
    ]
)


@given(data=st.data())
def test_whatever_is_changed_the_program_loads_or_a_diagnostic_says_why(data: st.DataObject, written: Any) -> None:
    described, tensors = copy.deepcopy(written[0]), written[1]
    path = data.draw(st.sampled_from(places(described)))
    owner = described
    for key in path[:-1]:
        owner = owner[key]
    owner[path[-1]] = data.draw(JUNK)
    try:
        program, _ = program_from_dict(described, lambda name: tensors[name], parse_spec)
    except SparcError:
        return
    program.text()


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{", '{"a":1,"a":2}', '{"a":NaN}', '{"a":Infinity}', "[" * 100_000, '{"a":' + "9" * 10_000 + "}"],
)
def test_json_that_is_malformed_is_refused(content: str) -> None:
    with pytest.raises(ArtifactError) as caught:
        from_json(content.encode(), "a file")
    assert caught.value.code == "SPARC503"
