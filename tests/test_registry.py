"""The registry, and tests/plugin: a third-party distribution that `make setup` installs."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import EntryPoint, PackageNotFoundError, version
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import sparc.api
from sparc import registry as registry_module
from sparc.capture import capture
from sparc.contract import Contract, Exact
from sparc.diag import Diagnostics, PassError, Severity
from sparc.encoding.int_grid import IntGrid
from sparc.encoding.parse import parse_spec
from sparc.pass_base import Pass, PassContext, Stage
from sparc.program import Program
from sparc.recipe import Recipe, Step
from sparc.registry import Extension, Registry
from sparc.rewrite import rewrite


@dataclass(frozen=True)
class Clean(Pass):
    name = "clean"
    stage = Stage.CANONICALIZE
    hard: bool = False

    @property
    def contract(self) -> Contract:
        return Exact()

    def run(self, program: Program, context: PassContext) -> None:
        raise NotImplementedError


@rewrite(lambda op, x: op.neg(op.neg(x)), contract=Exact())
def drop_negations(m: Any) -> Any:
    """-(-x) => x."""
    return m.x


class Place:
    legalizations = ()

    def __init__(self, name: str) -> None:
        self.name = name

    def check_options(self, options: Any) -> None:
        raise NotImplementedError

    def emit(self, program: Any, context: Any) -> Any:
        raise NotImplementedError

    def load(self, program: Any, files: Any, stored: Any, context: Any) -> Any:
        raise NotImplementedError


OWN = Extension(
    "own",
    passes=(Clean, drop_negations),
    encodings=(IntGrid,),
    recipes={"w8": Recipe((Step(Clean()),))},
    targets=(Place("onnx"), Place("onnx:portable")),
    lowerings={("onnx", "IntGrid"): print},
    kernels=("kernel",),
)


def refused(call: Callable[..., Any], *args: Any) -> PassError:
    with pytest.raises(PassError) as caught:
        call(*args)
    return caught.value


def test_what_an_extension_registers_is_found_by_name() -> None:
    registry = Registry([OWN])
    assert registry.pass_type("clean") is Clean
    assert registry.pass_type("drop_negations") is type(drop_negations)
    assert registry.encoding("IntGrid") is IntGrid
    assert registry.recipe("w8") == Recipe((Clean(),))
    assert registry.target("onnx:portable").name == "onnx:portable"
    assert registry.lowerings == {("onnx", "IntGrid"): print}
    assert registry.kernels == ["kernel"]
    assert registry.owners["pass", "clean"] == registry.owners["target", "onnx"] == "own"


@pytest.mark.parametrize(
    ("kind", "name", "hint"),
    [
        ("pass_type", "claen", "did you mean clean?"),
        ("encoding", "intgrid", "did you mean IntGrid?"),
        ("recipe", "w88", "did you mean w8?"),
        ("target", "onnx:portabel", "did you mean onnx:portable"),
        ("target", "tensorrt", "the targets are onnx, onnx:portable"),
    ],
)
def test_unknown_names_get_a_suggestion(kind: str, name: str, hint: str) -> None:
    error = refused(getattr(Registry([OWN]), kind), name)
    assert error.code == "SPARC201"
    assert hint in error.diagnostic.hint


@pytest.mark.parametrize(
    ("again", "what"),
    [
        ({"passes": (Clean,)}, "the pass 'clean'"),
        ({"encodings": (IntGrid,)}, "the encoding 'IntGrid'"),
        ({"recipes": {"w8": Recipe()}}, "the recipe 'w8'"),
        ({"targets": (Place("onnx"),)}, "the target 'onnx'"),
        ({"lowerings": {("onnx", "IntGrid"): repr}}, "the lowering 'IntGrid for onnx'"),
    ],
)
def test_a_name_registered_twice_is_an_error_and_changes_nothing(again: dict[str, Any], what: str) -> None:
    registry = Registry([OWN])
    fresh = Extension("other", **{"targets": (), **again, "kernels": ("more",)})
    error = refused(registry.add, fresh)
    assert error.code == "SPARC210"
    assert what in error.diagnostic.what
    assert error.diagnostic.why == "by 'own' and by 'other'"
    assert registry.owners == Registry([OWN]).owners
    assert registry.kernels == ["kernel"]


def test_an_extension_may_not_register_a_name_twice_itself() -> None:
    assert refused(Registry, [Extension("own", passes=(Clean, Clean))]).code == "SPARC210"


@dataclass(frozen=True)
class OptionCalledWhere(Clean):
    name = "other"
    where: str = "*"


@dataclass(frozen=True)
class OptionWithoutText(Clean):
    name = "other"
    tensor: torch.Tensor | None = None


@dataclass(frozen=True)
class OptionNoneByChoice(Clean):
    name = "other"
    limit: float | None = 1.0


@dataclass(frozen=True)
class OptionAmbiguous(Clean):
    name = "other"
    grid: IntGrid | str = "none"


class NotFrozen(Clean):
    name = "other"
    more: int = 0


@dataclass(frozen=True)
class Nameless(Pass):
    pass


@dataclass(frozen=True)
class Abstract(Pass):
    name = "other"
    stage = Stage.FOLD


@dataclass(frozen=True)
class BadlyNamed(Clean):
    name = "other pass"


@pytest.mark.parametrize(
    ("contents", "why"),
    [
        ({"passes": (int,)}, "is no Pass"),
        ({"passes": (OptionCalledWhere,)}, "option called 'where'"),
        ({"passes": (OptionWithoutText,)}, "option 'tensor': values of type"),
        ({"passes": (OptionNoneByChoice,)}, "option 'limit' may be None, but None is not its default"),
        ({"passes": (OptionAmbiguous,)}, "option 'grid': a union of str with an encoding"),
        ({"passes": (NotFrozen,)}, "is no frozen dataclass"),
        ({"passes": (Nameless,)}, "has no name or no stage"),
        ({"passes": (Abstract,)}, "is abstract: it lacks contract, run"),
        ({"passes": (BadlyNamed,)}, "'other pass' is no name"),
        ({"encodings": (Clean,)}, "is no Encoding"),
        ({"targets": (object(),)}, "is no Target"),
        ({"recipes": {"x": [Clean()]}}, "recipe 'x' is no Recipe"),
        ({"recipes": {"../x": Recipe()}}, "'../x' is no name"),
        ({"lowerings": {"onnx": 0}}, "is no pair of strings"),
        ({"lowerings": {("onnx", "IntGrid"): "a table"}}, "is no function"),
    ],
)
def test_a_malformed_extension_is_refused(contents: dict[str, Any], why: str) -> None:
    error = refused(Registry, [Extension("bad", **contents)])
    assert error.code == "SPARC212"
    assert why in error.diagnostic.why


# entry points ---------------------------------------------------------------------------------------------------------
def good() -> Extension:
    return Extension("good", passes=(drop_negations,))


def broken() -> Extension:
    raise RuntimeError("no such thing")


def no_extension() -> int:
    return 3


def malformed() -> Extension:
    return Extension("malformed", passes=(Abstract,))


class Loadable(EntryPoint):
    """An entry point into this very module, under whatever name pytest imported it."""

    def load(self) -> Any:
        return globals()[self.attr]


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    def install(**points: str) -> None:
        found = [Loadable(name, f"tests:{value}", registry_module.GROUP) for name, value in points.items()]
        monkeypatch.setattr(registry_module, "entry_points", lambda group: found)

    return install


def test_broken_extensions_are_warned_of_and_the_others_loaded(installed: Callable[..., None]) -> None:
    installed(a="broken", b="missing", c="no_extension", d="malformed", e="good")
    diagnostics = Diagnostics()
    registry = Registry.load([Extension("own", passes=(Clean,))], diagnostics)
    assert set(registry.passes) == {"clean", "drop_negations"}
    warnings = list(diagnostics)
    assert [(warning.code.id, warning.severity) for warning in warnings] == [("SPARC212", Severity.WARNING)] * 4
    assert [warning.why.partition(":")[0] for warning in warnings] == [
        "RuntimeError",
        "KeyError",
        "TypeError",
        "the pass 'other' is abstract",
    ]


def test_compile_hears_of_broken_extensions(installed: Callable[..., None]) -> None:
    installed(a="broken")
    diagnostics = Diagnostics()
    sparc.api.registry(diagnostics)
    assert [warning.code.id for warning in diagnostics] == ["SPARC212"]


def test_installed_duplicates_are_an_error(installed: Callable[..., None]) -> None:
    installed(a="good", b="good")
    assert refused(Registry.load).code == "SPARC210"


def test_registries_share_nothing() -> None:
    first, second = Registry([OWN]), Registry()
    assert first.passes
    assert not second.passes
    assert not second.owners


# the plugin -----------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def plugged() -> Registry:
    try:
        version("sparc-plugin-example")
    except PackageNotFoundError:
        pytest.fail("tests/plugin is not installed: run `make setup`")
    diagnostics = Diagnostics()
    registry = Registry.load(diagnostics=diagnostics)
    assert not list(diagnostics)
    return registry


def test_the_plugin_registers_its_pass_encoding_and_recipe(plugged: Registry) -> None:
    assert plugged.owners["pass", "drop_repeated_relu"] == "example"
    assert plugged.owners["encoding", "PowersOfTwo"] == "example"
    recipe = plugged.recipe("example")
    assert Recipe.from_toml(recipe.to_toml(), plugged) == recipe


def test_the_plugins_pass_rewrites_a_program(plugged: Registry) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.ReLU(), nn.ReLU())
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    program = capture(model, (x,))
    expected = program.run(x)
    plugged.pass_type("drop_repeated_relu")().run(program, PassContext())
    assert program.text().count("relu(") == 1
    assert torch.equal(program.run(x), expected)


@given(
    st.integers(1, 7),
    st.integers(1, 5),
    st.integers(1, 9),
    st.integers(0, 2**32),
    st.sampled_from(["float32", "bfloat16"]),
)
def test_the_plugins_encoding_is_bitwise_exact_on_its_grid(
    levels: int, rows: int, columns: int, seed: int, dtype: str
) -> None:
    encodings = Registry.load().encodings
    encoding = parse_spec(f"PowersOfTwo(levels={levels})", encodings)
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(getattr(torch, dtype))
    weight[0, 0] = 0
    grid = encoding.fit(weight)
    rounded = encoding.round(weight, grid)
    parts = encoding.encode(rounded, grid)
    assert torch.equal(encoding.decode(parts, weight.shape, weight.dtype), rounded)
    assert sum(part.nbytes for part in parts.values()) == encoding.bytes(weight.shape)
    assert rounded[0, 0] == 0


def test_the_plugins_encoding_rounds_to_signed_powers_of_two(plugged: Registry) -> None:
    encoding = plugged.encoding("PowersOfTwo")(levels=3)
    weight = torch.tensor([[3.0, -4.0, 1.1, -0.4, 0.6]])
    assert encoding.round(weight, encoding.fit(weight)).tolist() == [[4.0, -4.0, 1.0, 0.0, 1.0]]
