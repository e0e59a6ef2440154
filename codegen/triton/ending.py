"""The end of a kernel: the epilogue's inputs are read, the product becomes the result, and is stored."""

from sparc.codegen.triton.problem import Access, Configuration, EpilogueInput, Problem


def lines(problem: Problem, configuration: Configuration) -> list[str]:
    """Code that takes `product` (and `product_1`) to the output `y`."""
    single = configuration.block_tokens == 1
    epilogue = problem.epilogue
    row, token = ("matrix_rows", "output_token") if problem.access.kind == "batched" else ("rows", "token")
    spread = ("", "") if single else ("[:, None]", "[None, :]")
    found = [f"place = {_place(problem.access, problem.rows, row + spread[0], token + spread[1])}"]
    found += [_load(each, token, single) for each in epilogue.inputs]
    found += epilogue.lines
    masks = []
    if problem.rows % configuration.block_rows:
        masks.append(f"(own_rows < {problem.rows})" + ("" if single else "[:, None]"))
    if not single:
        masks.append("(own_tokens < tokens)[None, :]")
    guard = f", mask={' & '.join(masks)}" if masks else ""
    return [*found, f"tl.store(y + place, ({epilogue.result}).to(tl.{_stored(epilogue.dtype)}){guard})"]


def _place(access: Access, rows: int, row: str, token: str) -> str:
    if access.kind in ("rows", "batched"):
        return f"{token} * {rows} + {row}"
    positions = access.positions
    return f"{token} // {positions} * {rows * positions} + {row} * {positions} + {token} % {positions}"


def _load(each: EpilogueInput, token: str, single: bool) -> str:
    address = {"feature": f"{each.name} + rows", "token": f"{each.name} + {token}", "full": f"{each.name} + place"}
    spread = {"feature": "[:, None]", "token": "[None, :]"}.get(each.kind, "")
    loaded = f"tl.load({address.get(each.kind, each.name)})"
    wide = "" if each.dtype in ("float32", "bool", "int32", "int64") else ".to(tl.float32)"
    return f"{each.name}_value = {loaded}{wide}{'' if single else spread}"


def _stored(dtype: str) -> str:
    return "int1" if dtype == "bool" else dtype
