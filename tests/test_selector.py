from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparc.diag import PassError
from sparc.selector import Level, Selector, assign


@dataclass(frozen=True)
class Site:
    weight: str
    operator: str = "linear"
    origins: tuple[str, ...] = ()


@dataclass(frozen=True)
class Step:
    pass_name: str
    where: str | tuple[str, ...] = "*"


NAMES = (
    "embed.weight",
    "model.layers.0.attn.query.weight",
    "model.layers.0.attn.key.weight",
    "model.layers.0.mlp.up.weight",
    "model.layers.1.mlp.up.weight",
    "model.layers.10.mlp.up.weight",
    "model.layers.10.mlp.experts.gate_up",
    "head.weight",
)
SITES = [Site(name, "embedding" if name.startswith("embed") else "linear") for name in NAMES]


def selected(where: str | tuple[str, ...], sites: list[Site] = SITES) -> set[str]:
    return assign([Step("round", where)], sites)[0]


def code_of(where: str | tuple[str, ...]) -> str:
    with pytest.raises(PassError) as caught:
        selected(where)
    return caught.value.code


def names(*indices: int) -> set[str]:
    return {NAMES[index] for index in indices}


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("*", names(*range(8))),
        ("**", names(*range(8))),
        ("head", names(7)),
        ("head.weight", names(7)),
        ("model.layers.0", names(1, 2, 3)),
        ("model.layers.1", names(4)),
        ("model.layers.1*", names(4, 5, 6)),
        ("model.layers.?", names(1, 2, 3, 4)),
        ("model.layers.?.mlp", names(3, 4)),
        ("model.layers.*.mlp.*", names(3, 4, 5, 6)),
        ("*.mlp", names(3, 4, 5, 6)),
        ("*.up", names(3, 4, 5)),
        ("*.head", names(7)),
        ("*.model.layers.1", names(4)),
        ("*.gate_up", names(6)),
        ("*.weight", names(0, 1, 2, 3, 4, 5, 7)),
        ("model.layers.[01]", names(1, 2, 3, 4)),
        ("model.layers.[!1]", names(1, 2, 3)),
        ("model.layers.{0..1}", names(1, 2, 3, 4)),
        ("model.layers.{0,10}.mlp", names(3, 5, 6)),
        ("model.layers.{0.attn.{query,key},1}", names(1, 2, 4)),
        ("*.{query,key}", names(1, 2)),
        ("@linear", names(*range(1, 8))),
        ("@embedding", names(0)),
        ("@{linear,embedding}", names(*range(8))),
        ("@*", names(*range(8))),
        ("*.mlp@linear", names(3, 4, 5, 6)),
        ("!head", names(*range(7))),
        ("!@linear", names(0)),
        (("@linear", "!head", "!*.attn"), names(3, 4, 5, 6)),
        (("!head", "*"), names(*range(7))),
        (("embed", "head"), names(0, 7)),
        ("!*", set()),
    ],
)
def test_patterns_cover_what_they_say(where: str | tuple[str, ...], expected: set[str]) -> None:
    assert selected(where) == expected


def test_order_of_patterns_means_nothing() -> None:
    assert selected(("!head", "@linear")) == selected(("@linear", "!head")) == names(*range(1, 7))


def test_a_site_is_known_by_every_name_it_had() -> None:
    merged = [Site("merged.weight", origins=("attn.query.weight", "attn.key.weight")), Site("other.weight")]
    assert selected("attn.key", merged) == {"merged.weight"}
    assert selected("merged", merged) == {"merged.weight"}
    assert selected("!attn.query", merged) == {"other.weight"}


def test_special_characters_stand_for_themselves() -> None:
    sites = [Site("a+b(c).weight"), Site("aab(c).weight"), Site("a-b$.weight")]
    assert selected("a+b(c)", sites) == {"a+b(c).weight"}
    assert selected("a-b$", sites) == {"a-b$.weight"}


@pytest.mark.parametrize(
    "where",
    [
        "",
        (),
        "!",
        "@",
        "x@",
        "!!x",
        "a@b@c",
        "a b",
        "{a",
        "a}",
        "{a}}",
        "[",
        "[]",
        "[z-a]",
        "[a.b]",
        "{9..1}",
        "x" * 1001,
        ("ok", ""),
    ],
)
def test_malformed_patterns_are_refused(where: str | tuple[str, ...]) -> None:
    assert code_of(where) == "SPARC213"


@pytest.mark.parametrize("where", ["{0..999999}", "{a,b}" * 20, "{,}" * 40, "{{a,b},{c,d}}" * 12])
def test_patterns_that_stand_for_too_many_names_are_refused(where: str) -> None:
    assert code_of(where) == "SPARC213"


def test_no_pattern_backtracks() -> None:
    assert Selector.parse("*." + "*a" * 30 + "*b.c").level(["a" * 2000], "linear") is None  # would never end if it did


# matching nothing -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("where", "suggested"),
    [
        ("hed", "head"),
        ("*.ead", "head"),
        ("layers.0", "*.layers.0"),
        ("model.layers.*.mpl.*", "model.layers.*.mlp"),
        ("model.layers.11.mlp", "model.layers.1.mlp"),
        ("!haed", "head"),
        ("@lienar", "@linear"),
        ("!@embeding", "@embedding"),
        ("embed@linear", "@embedding"),
        (("head", "bodi"), "embed"),
    ],
)
def test_what_matches_nothing_is_refused_with_the_nearest_name(where: str | tuple[str, ...], suggested: str) -> None:
    with pytest.raises(PassError) as caught:
        selected(where)
    assert caught.value.code == "SPARC204"
    assert suggested in caught.value.diagnostic.hint


def test_a_type_that_this_model_does_not_have_selects_nothing() -> None:
    assert selected("@conv") == set()
    assert selected("!@conv_transposed") == set(NAMES)


def test_naming_a_weight_that_is_no_site_is_no_mistake() -> None:
    assert assign([Step("round", "norm")], SITES, [Site("norm.weight")]) == [set()]


def test_everything_of_nothing_is_nothing() -> None:
    assert selected("*", []) == set()


# levels ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_name_beats_type_beats_everything(order: tuple[int, ...]) -> None:
    steps = [Step("round", "*"), Step("round", "@linear"), Step("round", "*.mlp")]
    claimed = dict(zip(order, assign([steps[index] for index in order], SITES), strict=True))
    assert claimed == {0: names(0), 1: names(1, 2, 7), 2: names(3, 4, 5, 6)}


def test_between_equals_the_later_step_wins() -> None:
    assert assign([Step("round", "*.mlp"), Step("round", "*.up")], SITES) == [names(6), names(3, 4, 5)]
    assert assign([Step("round", "*"), Step("round", "*")], SITES) == [set(), set(NAMES)]


def test_each_pattern_of_a_step_has_its_own_level() -> None:
    steps = [Step("round", ("head", "@embedding")), Step("round", "@*"), Step("round", ("@linear", "embed"))]
    assert assign(steps, SITES) == [names(7), set(), names(*range(7))]


def test_other_passes_do_not_compete() -> None:
    steps = [Step("prune", "*"), Step("round", "head"), Step("round", "*")]
    assert assign(steps, SITES) == [set(NAMES), names(7), set(NAMES) - names(7)]


def test_levels_are_ordered() -> None:
    assert Level.NAME > Level.OPERATOR > Level.GLOBAL
    assert Selector.parse(("*", "@linear", "x")).level(["x.weight"], "linear") is Level.NAME


@given(
    st.lists(
        st.sampled_from(["*", "@linear", "@embedding", "head", "*.mlp", "model.layers.{0..9}", "!head", "!@embedding"]),
        max_size=6,
    ),
    st.lists(st.sampled_from(["round", "prune"]), min_size=6, max_size=6),
)
def test_every_selected_site_is_claimed_exactly_once_for_each_pass(patterns: list[str], passes: list[str]) -> None:
    steps = [Step(name, where) for name, where in zip(passes, patterns, strict=False)]
    claimed = assign(steps, SITES)
    for name in {step.pass_name for step in steps}:
        own = [claim for step, claim in zip(steps, claimed, strict=True) if step.pass_name == name]
        covered = {weight for step in steps if step.pass_name == name for weight in selected(step.where)}
        assert set().union(*own) == covered
        assert sum(map(len, own)) == len(covered)
