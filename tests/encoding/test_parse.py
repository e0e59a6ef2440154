import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparc.diag import PassError
from sparc.encoding.base import Encoding
from sparc.encoding.binary_code import BinaryCode
from sparc.encoding.blocks import Blocks
from sparc.encoding.codebook import Codebook
from sparc.encoding.dense import Dense
from sparc.encoding.float8 import Float8
from sparc.encoding.int_grid import IntGrid
from sparc.encoding.microscaling import MXFP4, NVFP4
from sparc.encoding.nm import NM
from sparc.encoding.parse import BUILTIN, parse_spec


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        (IntGrid(), "IntGrid(bits=8)"),
        (IntGrid(4, "channel", False), "IntGrid(bits=4, symmetric=False)"),
        (NM(of=IntGrid()), "NM(n=2, m=4, of=IntGrid(bits=8))"),
        (NM(), "NM(n=2, m=4)"),
        (Blocks(), "Blocks(size=(64, 64))"),
        (Dense(), "Dense()"),
        (Float8(), "Float8()"),
        (Float8(32, "float16"), "Float8(group=32, scale_dtype='float16')"),
        (MXFP4(), "MXFP4()"),
        (NM(of=NVFP4()), "NM(n=2, m=4, of=NVFP4())"),
        (Codebook(), "Codebook(kind='nf4', bits=4)"),
        (Codebook("kmeans", 3, "none"), "Codebook(kind='kmeans', bits=3, group='none')"),
        (BinaryCode(2, 64), "BinaryCode(bits=2, group=64)"),
    ],
)
def test_a_spec_says_what_a_report_needs_and_nothing_else(encoding: Encoding, text: str) -> None:
    assert str(encoding) == text
    assert parse_spec(text) == encoding


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("Dense()", Dense()),
        ("IntGrid(bits=4, group=32)", IntGrid(4, 32)),
        ("IntGrid(4, 32, False, 'minimum', scale_dtype='float16')", IntGrid(4, 32, False, "minimum", "float16")),
        ("NM(n=2, m=4, of=IntGrid(bits=4, group=128))", NM(2, 4, of=IntGrid(4, 128))),
        (" NM( 2,4,\n of = IntGrid( 4 ) ) ", NM(2, 4, of=IntGrid(4))),
        ("Blocks((64, 32), Dense('float16'))", Blocks((64, 32), Dense("float16"))),
        ("Blocks([8, 8])", Blocks((8, 8))),
    ],
)
def test_texts_are_read(text, encoding):
    assert parse_spec(text) == encoding
    assert parse_spec(str(encoding)) == encoding


def grids():
    groups = st.integers(2, 4096) | st.sampled_from(["channel", "tensor"])
    dtypes = st.sampled_from(["float32", "float16", "bfloat16"])
    bits = st.sampled_from([2, 3, 4, 8])
    symmetric = st.builds(IntGrid, bits, groups, st.just(True), st.just("integer"), dtypes)
    return symmetric | st.builds(IntGrid, bits, groups, st.just(False), st.sampled_from(["integer", "minimum"]), dtypes)


def elements():
    return grids() | st.builds(Dense, st.sampled_from(["float64", "float32", "float16", "bfloat16"]))


def patterns():
    return st.integers(2, 256).flatmap(lambda m: st.tuples(st.integers(1, m - 1), st.just(m)))


@given(
    elements()
    | st.builds(lambda pattern, of: NM(*pattern, of=of), patterns(), elements())
    | st.builds(Blocks, st.tuples(st.integers(1, 512), st.integers(1, 512)), elements())
)
def test_every_encoding_is_read_back(encoding):
    read = parse_spec(str(encoding))
    assert read == encoding
    assert str(read) == str(encoding)


@pytest.mark.parametrize(
    ("text", "code", "says"),
    [
        ("IntGird(4)", "SPARC201", "did you mean IntGrid"),
        ("intgrid(4)", "SPARC201", "did you mean IntGrid"),
        ("NM(2, 4, of=Denze())", "SPARC201", "did you mean Dense"),
        ("print('x')", "SPARC201", "unknown encoding 'print'"),
        ("int4", "SPARC209", "neither a literal nor a call"),
        ("IntGrid", "SPARC209", "write IntGrid(...)"),
        ("IntGrid(bits=5)", "SPARC209", "5-bit"),
        ("IntGrid(bits='4')", "SPARC209", "'4'-bit"),
        ("IntGrid(bits=4.0)", "SPARC209", "4.0-bit"),
        ("IntGrid(group=True)", "SPARC209", "group by True"),
        ("IntGrid(group=-1)", "SPARC209", "group by -1"),
        ("IntGrid(symmetric=1)", "SPARC209", "symmetric=1"),
        ("IntGrid(zero='minimum')", "SPARC209", "symmetric=False"),
        ("IntGrid(bist=4)", "SPARC209", "bist"),
        ("IntGrid(4, bits=4)", "SPARC209", "bits"),
        ("IntGrid(bits=4, bits=8)", "SPARC209", "twice"),
        ("IntGrid(1, 2, 3, 4, 5, 6)", "SPARC209", ""),
        ("IntGrid(**{'bits': 4})", "SPARC209", ""),
        ("IntGrid(*(4, 32))", "SPARC209", "Starred"),
        ("IntGrid(2 + 2)", "SPARC209", "BinOp"),
        ("IntGrid(bits=[x for x in (4,)])", "SPARC209", "ListComp"),
        ("IntGrid(4).fit", "SPARC209", "Attribute"),
        ("sparc.IntGrid(4)", "SPARC209", "Call"),
        ("(IntGrid(4), IntGrid(8))", "SPARC209", "names no encoding"),
        ("4", "SPARC209", "names no encoding"),
        ("", "SPARC209", "not written like a call"),
        ("IntGrid(", "SPARC209", "not written like a call"),
        ("IntGrid(4) IntGrid(8)", "SPARC209", "not written like a call"),
        ("IntGrid(4)\x00", "SPARC209", ""),
        ("NM(of=" * 9 + "Dense()" + ")" * 9, "SPARC209", "nested at most 8"),
        ("IntGrid(" + " " * 1000 + ")", "SPARC209", "1000 characters"),
        ("-" * 900 + "1", "SPARC209", ""),
    ],
)
def test_bad_texts_are_refused(text, code, says):
    with pytest.raises(PassError) as caught:
        parse_spec(text)
    assert caught.value.code == code
    assert says in str(caught.value)


@given(st.text(max_size=60) | st.text(alphabet="IntGridNM(),=0124'\"[]{}*.:_ of", max_size=60))
def test_any_text_is_read_or_refused(text):
    code = ""
    try:
        encoding = parse_spec(text)
    except PassError as error:
        encoding, code = None, error.code
    assert code in ("SPARC201", "SPARC209") if encoding is None else parse_spec(str(encoding)) == encoding


def test_only_known_names_are_read():
    elements = {"Dense", "IntGrid", "Float8", "MXFP4", "NVFP4", "Codebook", "BinaryCode"}
    assert set(BUILTIN) == elements | {"NM", "Blocks", "Unstructured"}
    with pytest.raises(PassError) as caught:
        parse_spec("IntGrid(4)", {"Dense": Dense})
    assert caught.value.code == "SPARC201"
