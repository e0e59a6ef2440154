"""Laws about the repository itself: what is where, who imports whom, and that pages and lists agree with the code."""

import ast
import functools
import importlib.util
import os
import re
import sys
import tomllib
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path
from types import ModuleType

import pytest

from sparc import codes

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SOURCES = {"sparc": "sparc", "passes": "sparc.passes", "codegen": "sparc.codegen"}
FOLDERS = (*SOURCES, "tests", "benchmarks", "examples", "docs")
LONGEST_FILE = 400
LONGEST_FUNCTION = 50


def walk(folder: Path) -> Iterator[Path]:
    """Every file that belongs to the repository; links, hidden folders and build outputs are left out."""
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(
            each for each in folders if not each.startswith((".", "__")) and each not in ("build", "dist", "out")
        )
        yield from (Path(place) / each for each in sorted(files))


PYTHON = [path for folder in FOLDERS for path in walk(ROOT / folder) if path.suffix == ".py"]


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


@pytest.fixture(scope="module", autouse=True)
def _trees_are_let_go() -> Iterator[None]:
    """Millions of nodes would slow down every collection of garbage in the tests that follow."""
    yield
    parsed.cache_clear()


def module_of(path: Path) -> str:
    """The dotted name a source file is imported under."""
    folder, *rest = path.relative_to(ROOT).with_suffix("").parts
    parts = [SOURCES.get(folder, folder), *rest]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in PYTHON if path.relative_to(ROOT).parts[0] in SOURCES}


def imports(tree: ast.AST, *, lazy: bool) -> Iterator[str]:
    """The modules a file imports: when it is loaded, and with `lazy` also inside functions; type checking left out."""
    todo = [tree]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            yield from (f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base for alias in node.names)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        elif lazy or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            todo += ast.iter_child_nodes(node)


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


# files ----------------------------------------------------------------------------------------------------------------
def test_the_package_list_is_what_is_on_disk() -> None:
    packages = {module_of(path.parent / "__init__.py") for path in MODULES.values()}
    assert sorted(PROJECT["tool"]["setuptools"]["packages"]) == sorted(packages)
    for package in packages:
        assert package in MODULES, f"{package} has no __init__.py"


def test_links_make_one_package_of_three_folders() -> None:
    for folder in ("passes", "codegen"):
        assert os.readlink(ROOT / "sparc" / folder) == f"../{folder}"
    assert (ROOT / "sparc" / "py.typed").is_file()


def test_package_data_is_shipped() -> None:
    patterns = PROJECT["tool"]["setuptools"]["package-data"]
    for folder in SOURCES:
        for path in walk(ROOT / folder):
            inside = patterns.get(module_of(path.parent / "__init__.py"), [])
            assert path.suffix == ".py" or any(path.match(pattern) for pattern in inside), f"{path} is not shipped"


@pytest.mark.parametrize("name", ["passes", "codegen"])
def test_the_bare_names_cannot_be_imported(name: str) -> None:
    spec = importlib.util.spec_from_file_location(name, ROOT / name / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    with pytest.raises(ImportError, match=f"sparc.{name}"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_files_and_functions_are_short() -> None:
    long = [f"{path}: {count} lines" for path in PYTHON if (count := len(lines_of(path))) > LONGEST_FILE]
    for path in PYTHON:
        tree = parsed(path)
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and code_lines(node) > LONGEST_FUNCTION:
                long.append(f"{path}:{node.lineno} {node.name}: {code_lines(node)} lines")
    assert not long, "\n".join(long)


def lines_of(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def code_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its docstring."""
    first = node.body[0]
    documented = (
        isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
    )
    docstring = (first.end_lineno or 0) - first.lineno + 1 if documented else 0
    return (node.end_lineno or 0) - node.lineno + 1 - docstring


def test_no_file_names_a_machine() -> None:
    machine = re.compile(
        r"[/](?:work|root|home|Users)[/]|[/]tmp[/]bash|pypi[.]org|pythonhosted[.]org|pytorch[.]org[/]whl"
    )
    texts = {".py", ".md", ".toml", ".txt", ".json", ".jinja", ".html", ".cfg", ".yml", ""}
    found = []
    for path in [*walk(ROOT), *walk(ROOT / ".ci")]:
        if path.suffix in texts and not path.is_symlink():
            found += [f"{path}:{n}: {m[0]}" for n, line in enumerate(lines_of(path), 1) if (m := machine.search(line))]
    assert not found, "\n".join(found)


# imports --------------------------------------------------------------------------------------------------------------
def test_passes_and_codegen_never_see_each_other() -> None:
    for module, path in MODULES.items():
        for used in imports(parsed(path), lazy=True):
            assert not (within(module, "sparc.passes") and within(used, "sparc.codegen")), f"{module} imports {used}"
            assert not (within(module, "sparc.codegen") and within(used, "sparc.passes")), f"{module} imports {used}"


def test_the_core_knows_neither_but_for_api_and_cli_lazily() -> None:
    for module, path in MODULES.items():
        if within(module, "sparc.passes") or within(module, "sparc.codegen"):
            continue
        lazy = module not in ("sparc.api", "sparc.cli")
        for used in imports(parsed(path), lazy=lazy):
            assert not within(used, "sparc.passes"), f"{module} imports {used}"
            assert not within(used, "sparc.codegen"), f"{module} imports {used}"


def test_the_library_never_imports_its_surroundings() -> None:
    for module, path in MODULES.items():
        outside = {used.partition(".")[0] for used in imports(parsed(path), lazy=True)}
        assert not outside & {"tests", "benchmarks", "examples", "docs", "passes", "codegen", "pickle"}, module


def test_no_module_is_loaded_in_a_cycle() -> None:
    graph = {
        module: {used for used in imports(parsed(path), lazy=False) if used in MODULES and used != module}
        for module, path in MODULES.items()
    }
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


# dependencies ---------------------------------------------------------------------------------------------------------
def declared(requirements: list[str]) -> set[str]:
    return {re.split(r"[^\w-]", requirement)[0].lower().replace("_", "-") for requirement in requirements}


def test_every_dependency_is_declared_and_used() -> None:
    distributions = packages_distributions()
    used = set()
    for path in MODULES.values():
        for module in imports(parsed(path), lazy=True):
            name = module.partition(".")[0]
            if name not in sys.stdlib_module_names and name != "sparc":
                used |= {each.lower().replace("_", "-") for each in distributions.get(name, [name])}
    needed = declared(PROJECT["project"]["dependencies"])
    extras = PROJECT["project"]["optional-dependencies"]
    optional = declared([*extras["models"], *extras["cuda"]]) - needed
    assert used - optional == needed


def test_every_dependency_is_justified() -> None:
    page = (ROOT / "docs" / "dependencies.md").read_text(encoding="utf-8").lower()
    extras = PROJECT["project"]["optional-dependencies"].values()
    for name in declared([*PROJECT["project"]["dependencies"], *(each for extra in extras for each in extra)]):
        assert f"| `{name}` |" in page.replace("_", "-"), f"docs/dependencies.md has no line for {name}"


# diagnostics ----------------------------------------------------------------------------------------------------------
@pytest.fixture
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_diagnostics_is_up_to_date(generator: ModuleType) -> None:
    page = generator.PAGE.read_text(encoding="utf-8")
    assert page == generator.diagnostics_page(), "run `make docs`"
    for code in codes.catalogue().values():
        assert page.count(f"### {code.id}: ") == 1


def test_codes_are_unique_sorted_and_explained() -> None:
    every = [value for value in vars(codes).values() if isinstance(value, codes.Code)]
    assert [code.id for code in every] == sorted({code.id for code in every})
    for code in every:
        assert re.fullmatch(r"SPARC[1-5]\d\d", code.id)
        assert code.meaning.endswith("."), code.id
        assert not code.hint.endswith("."), code.id


def test_every_code_is_used() -> None:
    source = "\n".join(path.read_text(encoding="utf-8") for name, path in MODULES.items() if name != "sparc.codes")
    names = [name for name, value in vars(codes).items() if isinstance(value, codes.Code)]
    unused = [name for name in names if not re.search(rf"codes\.{name}\b", source)]
    assert not unused, f"no source file uses {', '.join(unused)}"


# commands -------------------------------------------------------------------------------------------------------------
def test_make_has_its_targets_and_ci_can_run() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in ("setup", "demo", "lint", "types", "test", "test-all", "golden", "bench", "docs"):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
