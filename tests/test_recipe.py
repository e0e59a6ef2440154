import enum
import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparc import api, passes
from sparc.contract import Approximate, Contract
from sparc.diag import PassError
from sparc.encoding.base import Encoding
from sparc.encoding.int_grid import IntGrid
from sparc.encoding.nm import NM
from sparc.pass_base import Pass, PassContext, Stage
from sparc.program import Program
from sparc.recipe import Recipe, Step, resolve_recipe
from sparc.registry import Extension, Registry
from sparc.selector import OPERATOR_TYPES
from sparc.toml import MOST_BYTES, read_toml, toml_value


class Order(enum.StrEnum):
    FIRST = "first"
    LAST = "last"


@dataclass(frozen=True)
class Base(Pass):
    @property
    def contract(self) -> Contract:
        return Approximate()

    def run(self, program: Program, context: PassContext) -> None:
        raise NotImplementedError


@dataclass(frozen=True)
class Mask(Base):
    name = "mask"
    stage = Stage.MASK
    encoding: Encoding = NM(2, 4)


@dataclass(frozen=True)
class Round(Base):
    name = "round"
    stage = Stage.ROUND
    encoding: Encoding = IntGrid()
    search: bool = False
    steps: int = 80
    clip: float | Literal["auto"] = 1.0
    note: str = ""
    order: Order = Order.FIRST
    limit: float | None = None
    candidates: tuple[Encoding, ...] = ()
    window: tuple[int, float] = (1, 2.0)
    scales: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        if self.steps == 13:
            raise ValueError("thirteen steps bring bad luck")


@dataclass(frozen=True)
class Cut(Base):
    name = "cut"
    stage = Stage.CUT
    share: float = math.inf
    keep: bool = True


@dataclass(frozen=True)
class Demanding(Base):
    name = "demanding"
    stage = Stage.CAST
    grid: IntGrid | Literal["none"]


SHIPPED = Recipe((Round(),), name="w8")
REGISTRY = Registry([Extension("test", (Cut, Mask, Round, Demanding), (IntGrid, NM), recipes={"w8": SHIPPED})])


def read(text: str) -> Recipe:
    return Recipe.from_toml(text, REGISTRY)


def refused(call: Any, *args: Any) -> PassError:
    with pytest.raises(PassError) as caught:
        call(*args)
    return caught.value


# both ways ------------------------------------------------------------------------------------------------------------
def test_a_pass_says_its_encodings_and_what_differs_from_the_defaults() -> None:
    assert str(Round()).startswith("round(encoding=IntGrid(bits=8)")
    assert str(Round(IntGrid(4), search=True)).startswith("round(encoding=IntGrid(bits=4), search=True")
    assert str(Cut()) == "cut()"
    assert "encoding" not in Recipe((Step(Round()),)).to_toml()


def test_a_recipe_reads_as_written() -> None:
    text = """\
name = "mine"
goal = "size"

[[steps]]
pass = "mask"
where = ["*.mlp", "!*.mlp.0"]

[[steps]]
pass = "round"
encoding = "IntGrid(bits=4, group=32)"
search = true
candidates = ["IntGrid(bits=4)", "NM(n=2, m=4, of=IntGrid(bits=8))"]

[[steps]]
pass = "round"
where = "@embedding"
"""
    expected = Recipe(
        (
            Step(Mask(), ("*.mlp", "!*.mlp.0")),
            Step(Round(IntGrid(4, group=32), True, candidates=(IntGrid(4), NM(2, 4, of=IntGrid())))),
            Step(Round(), "@embedding"),
        ),
        "size",
        "mine",
    )
    assert read(text) == expected
    assert expected.to_toml() == text


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
GRIDS = st.builds(IntGrid, st.sampled_from([2, 4, 8]), st.sampled_from([2, 32, "channel", "tensor"]), st.booleans())
ROUNDS = st.builds(
    Round,
    encoding=GRIDS | st.builds(NM, st.just(2), st.just(4), of=GRIDS),
    search=st.booleans(),
    steps=st.integers().filter(lambda steps: steps != 13),
    clip=st.floats(allow_nan=False) | st.just("auto"),
    note=TEXT,
    order=st.sampled_from(Order),
    limit=st.none() | st.floats(allow_nan=False),
    candidates=st.lists(GRIDS, max_size=12).map(tuple),
    window=st.tuples(st.integers(), st.floats(allow_nan=False)),
    scales=st.none() | st.dictionaries(TEXT, st.floats(allow_nan=False), max_size=3),
)
WHERE = st.sampled_from(["*", "head", "@linear", ("a", "!b"), ("x",), ("*.a_module_of_a_long_name",) * 9])
STEPS = st.lists(st.builds(Step, ROUNDS, WHERE), max_size=4).map(tuple)


@given(STEPS, st.sampled_from(["latency", "size"]), TEXT)
def test_every_recipe_comes_back_from_its_toml(
    steps: tuple[Step, ...], goal: Literal["latency", "size"], name: str
) -> None:
    recipe = Recipe((Step(Cut(0.5)), *steps), goal, name)
    text = recipe.to_toml()
    assert read(text) == recipe
    assert read(text).to_toml() == text


def test_options_at_their_defaults_are_left_out() -> None:
    recipe = Recipe((Step(Round(IntGrid(), steps=80)), Step(Round(), "*")))
    assert recipe.to_toml() == '[[steps]]\npass = "round"\n\n[[steps]]\npass = "round"\n'
    assert Recipe().to_toml() == "steps = []\n"


def test_whole_numbers_do_for_options_that_are_fractions() -> None:
    option = read('[[steps]]\npass = "cut"\nshare = 1').steps[0].pass_
    assert option == Cut(1.0)
    assert isinstance(option.share, float)


def test_long_lists_stand_on_lines_of_their_own() -> None:
    names = [f"model.layers.{index}.mlp.gate_proj" for index in range(500)]
    text = Recipe((Step(Round(), tuple(names)),)).to_toml()
    assert max(map(len, text.splitlines())) < 100
    assert read(text).steps[0].where == tuple(names)


def test_a_recipe_too_long_to_be_read_is_not_written() -> None:
    recipe = Recipe(tuple(Step(Round(note="x" * 1000)) for _ in range(100)))
    assert refused(recipe.to_toml).code == "SPARC202"


def test_a_list_of_selectors_and_bare_passes_are_taken() -> None:
    assert Step(Round(), ["a", "b"]) == Step(Round(), ("a", "b"))  # type: ignore[arg-type]
    assert Recipe([Cut(), Step(Round(), "a")]) == Recipe((Step(Cut()), Step(Round(), "a")))  # type: ignore[arg-type]


# refusals -------------------------------------------------------------------------------------------------------------
def step(text: str, name: str = "round") -> str:
    return f'[[steps]]\npass = "{name}"\n{text}\n'


@pytest.mark.parametrize(
    ("text", "code", "says"),
    [
        ("", "SPARC202", "steps is missing"),
        ("stpes = []", "SPARC202", "did you mean steps?"),
        ("steps = 3", "SPARC202", "steps is no list"),
        ("steps = [3]", "SPARC202", "steps is no list"),
        ("steps = [", "SPARC202", "no valid TOML"),
        ("a = 1\na = 2", "SPARC202", "no valid TOML"),
        (f"steps = {'9' * 4000}", "SPARC202", "steps is no list"),
        ("goal = 'sise'\nsteps = []", "SPARC202", "did you mean size?"),
        ("goal = 3\nsteps = []", "SPARC202", "goal is 3"),
        ("name = 3\nsteps = []", "SPARC202", "name is 3"),
        ("[[steps]]\npas = 'round'", "SPARC202", "pass is missing"),
        ("[[steps]]\npass = 3", "SPARC202", "pass is 3"),
        (step("", "os.system"), "SPARC201", "unknown pass 'os.system'"),
        (step("", "Round"), "SPARC201", "did you mean round?"),
        (step("", "rund"), "SPARC201", "did you mean round?"),
        (step("encoding = 'IntGird(bits=4)'"), "SPARC201", "did you mean IntGrid?"),
        (step("encoding = 'os.system(1)'"), "SPARC209", "os.system"),
        (step("encoding = 'IntGrid(bits=5)'"), "SPARC209", "bits is 2, 3, 4 or 8"),
        (step("serch = true"), "SPARC209", "did you mean search?"),
        (step("search = 1"), "SPARC209", "option 'search' of step 1 ('round') is 1\n  why:   expected true or false"),
        (step("steps = true"), "SPARC209", "expected a whole number"),
        (step("steps = 1.0"), "SPARC209", "expected a whole number"),
        (step("clip = 'atuo'"), "SPARC209", "did you mean auto?"),
        (step("clip = nan"), "SPARC209", "expected a number or 'auto'"),
        (step("clip = 1979-05-27"), "SPARC209", "expected a number or 'auto'"),
        (step("note = 1"), "SPARC209", "expected a string"),
        (step("order = 'lasst'"), "SPARC209", "did you mean last?"),
        (step("encoding = 4"), "SPARC209", "expected an encoding such as 'IntGrid(bits=4)'"),
        (step("candidates = 'IntGrid()'"), "SPARC209", "expected a list of an encoding"),
        (step("window = [1]"), "SPARC209", "expected a list (a whole number, a number)"),
        (step("scales = {a = 'x'}"), "SPARC209", "expected a table of a number"),
        (step("steps = 13"), "SPARC209", "bad luck"),
        (step("", "demanding"), "SPARC209", "needs the option 'grid'"),
        (step("grid = 'NM(n=2, m=4)'", "demanding"), "SPARC209", "expected an encoding IntGrid or 'none'"),
        (step("grid = 'IntGird()'", "demanding"), "SPARC201", "did you mean IntGrid?"),
        (step("grid = 'nome'", "demanding"), "SPARC209", "did you mean none?"),
        (step("where = 3"), "SPARC213", "where=3"),
        (step("where = [3]"), "SPARC213", "patterns are strings"),
        (step("where = []"), "SPARC213", "where= is empty"),
        (step("where = '{a'"), "SPARC213", "not balanced"),
    ],
)
def test_what_is_wrong_is_said(text: str, code: str, says: str) -> None:
    error = refused(read, text)
    assert error.code == code
    assert says in str(error)
    assert error.diagnostic.hint or error.diagnostic.code.hint


@pytest.mark.parametrize(
    "text",
    [
        "x = 1\n" * (MOST_BYTES // 6 + 1),
        "# " + "é" * (MOST_BYTES // 2) + "\n",
        "a = " + "[" * 4000,
        "\n".join(["a = ["] + ["["] * 9 + ["]"] * 10),
        "a" + ".a" * 20_000 + " = 1",
        ".".join("abcdefghij") + " = 1",
    ],
    ids=["long", "long in bytes", "nested", "nested by lines", "dotted", "nested by dots"],
)
def test_toml_that_would_take_long_is_refused(text: str) -> None:
    assert refused(read_toml, text).code == "SPARC202"


def test_a_wrong_option_is_refused_in_python_too() -> None:
    assert "expected an encoding such as IntGrid(bits=4)" in str(refused(Step, Round("IntGrid(bits=4)")))  # type: ignore[arg-type]
    assert "expected a tuple of an encoding" in str(refused(Step, Round(candidates=[IntGrid()])))  # type: ignore[arg-type]
    assert refused(Recipe, (Round(search="yes"),)).code == "SPARC209"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("what", "says"), [(Round, "write Round()"), ("w8", "'w8' is no pass"), (None, "None is no pass")]
)
def test_what_is_no_pass_is_refused(what: Any, says: str) -> None:
    error = refused(Recipe, (what,))
    assert error.code == "SPARC202"
    assert says in str(error)


# order ----------------------------------------------------------------------------------------------------------------
def test_an_illegal_order_names_both_steps_and_the_fix() -> None:
    error = refused(read, step("") + step("", "mask") + step("", "cut"))
    assert error.code == "SPARC203"
    assert error.diagnostic.what == "step 2 ('mask') comes after step 1 ('round')"
    assert error.diagnostic.hint == "move step 2 ('mask') before step 1 ('round')"


@pytest.mark.parametrize(
    "steps", [(Cut(), Mask(), Round()), (Round(), Round()), (), (Cut(), Round(), Demanding("none"))]
)
def test_legal_orders_pass(steps: tuple[Pass, ...]) -> None:
    assert [step.pass_ for step in Recipe(tuple(map(Step, steps))).steps] == list(steps)


def test_the_fix_mends_the_order() -> None:
    error = refused(Recipe, (Cut(), Round(), Round(), Mask()))
    assert error.diagnostic.hint == "move step 4 ('mask') before step 2 ('round')"
    Recipe((Step(Cut()), Step(Mask()), Step(Round()), Step(Round())))


# resolving ------------------------------------------------------------------------------------------------------------
def test_everything_that_names_a_recipe_is_resolved(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("\ufeff" + SHIPPED.to_toml(), encoding="utf-8")
    for value in (SHIPPED, "w8", path, str(path)):
        assert resolve_recipe(value, REGISTRY) == SHIPPED
    for value in (Round(), Step(Round()), [Round()], iter([Step(Round())])):
        assert resolve_recipe(value, REGISTRY) == Recipe(SHIPPED.steps)


@pytest.mark.parametrize("value", [None, 3, b"w8", {"steps": []}, Round])
def test_what_names_no_recipe_is_refused(value: Any) -> None:
    assert refused(resolve_recipe, value, REGISTRY).code == "SPARC202"


def test_an_unknown_recipe_gets_a_suggestion() -> None:
    error = refused(resolve_recipe, "w88", REGISTRY)
    assert (error.code, error.diagnostic.hint) == ("SPARC201", "did you mean w8?")


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_bytes(b"name = '\xff'")
    (tmp_path / "huge.toml").write_bytes(b"#" * 10_000_000)
    for name in ("mine.toml", "huge.toml", "nul\0.toml", "."):
        assert refused(resolve_recipe, tmp_path / name, REGISTRY).code == "SPARC202"
    error = refused(resolve_recipe, str(tmp_path / "mien.toml"), REGISTRY)
    assert "mine.toml?" in error.diagnostic.hint


# TOML -----------------------------------------------------------------------------------------------------------------
VALUES = st.recursive(
    st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(VALUES)
def test_every_value_comes_back_from_toml(value: Any) -> None:
    back = tomllib.loads(f"x = {toml_value(value)}")["x"]
    assert back == value
    assert repr(back) == repr(value)


# the page -------------------------------------------------------------------------------------------------------------
PAGE = (Path(__file__).parent.parent / "docs" / "recipes.md").read_text(encoding="utf-8")


def test_the_recipes_on_the_page_can_be_read() -> None:
    blocks = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 2
    known = api.registry()
    for block in blocks:
        assert Recipe.from_toml(block, known).steps


def test_the_page_names_exactly_the_shipped_recipes() -> None:
    shipped = passes.extension().recipes
    assert set(re.findall(r"^\| `([\w-]+)` \| [A-Z]", PAGE, re.MULTILINE)) == set(shipped)


def test_every_shipped_recipe_comes_back_from_its_toml() -> None:
    for name, recipe in passes.extension().recipes.items():
        assert recipe.name == name
        assert Recipe.from_toml(recipe.to_toml(), api.registry()) == recipe


def test_the_page_names_the_stages_and_operator_types() -> None:
    stages = ", ".join(stage.name.lower().replace("_", " ") for stage in Stage)
    assert stages in PAGE.replace("\n", " ")
    assert all(f"`{operator}`" in PAGE for operator in OPERATOR_TYPES)
