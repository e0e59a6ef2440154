"""From the source of a generated kernel to the function that Triton compiles, launches or interprets."""

import linecache
import re
from functools import lru_cache
from typing import Any

from triton import knobs
from triton.runtime.jit import JITFunction

from sparc import codes
from sparc.codegen.triton.kernel import Kernel
from sparc.diag import LoweringError


def load_function(kernel: Kernel) -> JITFunction:
    """The `@triton.jit` function named `kernel.name`, or Triton's interpreter of it where that is switched on.

    The same source gives the same function, so that what Triton keeps with a function (compiled variants) is kept.

    Raises:
        LoweringError: SPARC409 when the source is not valid Python, fails when it is executed, or lacks the function.
    """
    return _load(kernel.digest, kernel.name, kernel.source, bool(knobs.runtime.interpret))


def failure(name: str, error: BaseException | str) -> LoweringError:
    """SPARC409 for the kernel `name`, with the first line of what the compiler said."""
    # Triton's own errors begin with an excerpt of the source, and carry the message beside it; ptxas marks its errors.
    text = getattr(error, "error_message", None) or f"{type(error).__name__}: {error}"
    if isinstance(error, str):
        text = error
    elif marked := re.search(r"\berror *: *(.+)", text):
        text = marked[1]
    first = text.strip().partition("\n")[0]
    return LoweringError(codes.KERNEL_FAILED, f"the kernel `{name}` does not compile", why=first)


@lru_cache(maxsize=1024)
def _load(digest: str, name: str, source: str, interpreted: bool) -> JITFunction:
    filename = f"<sparc {name} {digest}>"
    # Triton reads a function's source with `inspect`, which finds it here; an entry without a time is never dropped.
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    namespace: dict[str, Any] = {"__name__": f"sparc_kernel_{digest}"}
    try:
        exec(compile(source, filename, "exec"), namespace)
    except Exception as error:
        raise failure(name, error) from error
    function = namespace.get(name)
    if not hasattr(function, "arg_names"):
        raise failure(name, "its source does not define it as a Triton function")
    return function
