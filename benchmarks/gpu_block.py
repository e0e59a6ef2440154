"""One decoder block of Llama-3-8B, at one token after 1023 others: `w4` against torch.compile in float16."""

import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu

import sparc
from benchmarks.gpu_launch import said
from sparc.codegen.triton.emission import TritonEmission, module_of
from sparc.codegen.triton.timing import Replay, record, time_in_turns

_REPEATS = 4  # calls in one graph, on two sets of weights in turn, so that caches are cold


@dataclass(frozen=True)
class Sizes:
    """Of a block; the defaults are Llama-3-8B's.

    Args:
        hidden: features.
        heads: of queries.
        groups: heads of keys and values.
        inner: features between the gate and the last layer.
        past: tokens in the cache.
    """

    hidden: int = 4096
    heads: int = 32
    groups: int = 8
    inner: int = 14336
    past: int = 1023

    @property
    def head(self) -> int:
        """Features of a head."""
        return self.hidden // self.heads


class Block(nn.Module):
    """Grouped-query attention with rotary positions, then SwiGLU; a norm by the root mean square before each."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        inside = sizes.groups * sizes.head
        self.before_attention, self.before_gate = (nn.Parameter(torch.rand(sizes.hidden) + 0.5) for _ in range(2))
        self.q = nn.Linear(sizes.hidden, sizes.hidden, bias=False)
        self.k = nn.Linear(sizes.hidden, inside, bias=False)
        self.v = nn.Linear(sizes.hidden, inside, bias=False)
        self.o = nn.Linear(sizes.hidden, sizes.hidden, bias=False)
        self.gate = nn.Linear(sizes.hidden, sizes.inner, bias=False)
        self.up = nn.Linear(sizes.hidden, sizes.inner, bias=False)
        self.down = nn.Linear(sizes.inner, sizes.hidden, bias=False)

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """The block's output.

        Args:
            x: `[1, 1, hidden]`.
            cosine: of the position's angles, `[head]`.
            sine: likewise.
            keys: of the past, `[1, groups, past, head]`.
            values: likewise.
        """
        y = rms_norm(x, (self.sizes.hidden,), self.before_attention, 1e-5)
        q, k, v = (self._heads(layer(y)) for layer in (self.q, self.k, self.v))
        keys = torch.cat([keys, _rotated(k, cosine, sine)], dim=2)
        values = torch.cat([values, v], dim=2)
        found = scaled_dot_product_attention(_rotated(q, cosine, sine), keys, values, enable_gqa=True)
        x = x + self.o(found.transpose(1, 2).flatten(-2))
        y = rms_norm(x, (self.sizes.hidden,), self.before_gate, 1e-5)
        result: Tensor = x + self.down(silu(self.gate(y)) * self.up(y))
        return result

    def _heads(self, y: Tensor) -> Tensor:
        return y.unflatten(-1, (-1, self.sizes.head)).transpose(1, 2)


def _rotated(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cosine + torch.cat([-second, first], dim=-1) * sine


def make_inputs(sizes: Sizes) -> tuple[Tensor, ...]:
    """Random inputs of the block, float16."""
    generator = torch.Generator().manual_seed(0)
    angles = sizes.past * 500000.0 ** -(torch.arange(sizes.head) % (sizes.head // 2) * 2 / sizes.head)
    cache = (1, sizes.groups, sizes.past, sizes.head)
    tensors = [torch.randn(1, 1, sizes.hidden, generator=generator), angles.cos(), angles.sin()]
    tensors += [torch.randn(cache, generator=generator) for _ in range(2)]
    return tuple(tensor.half() for tensor in tensors)


def make_block(sizes: Sizes) -> Block:
    """A block of random weights, float16; always the same."""
    torch.manual_seed(0)
    return Block(sizes).half().eval()


def compile_block(folder: Path, sizes: Sizes, target: str) -> None:
    """Compile the block with `w4`, without what costs time and is not measured here, and save it.

    Nothing is tuned: that is done where the artifact is loaded, when nobody else times on the GPU.
    """
    made = sparc.compile(
        make_block(sizes), make_inputs(sizes), recipe="w4", target=target,
        verify="types", measure=False, options={"tune": False},
    )  # fmt: skip
    made.save(folder)


class Compilation:
    """The block being compiled in a process of its own, while kernels are timed."""

    def __init__(self) -> None:
        self._folder = TemporaryDirectory()
        self.artifact = Path(self._folder.name) / "block"
        self._log = Path(self._folder.name) / "log"
        command = [sys.executable, "-m", "benchmarks.gpu_block", str(self.artifact)]
        with self._log.open("w") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)

    def __enter__(self) -> "Compilation":
        return self

    def __exit__(self, *raised: object) -> None:
        self._process.kill()
        self._process.wait()
        self._folder.cleanup()

    def result(self, seconds: float) -> sparc.Artifact:
        """The artifact, loaded.

        Raises:
            TimeoutExpired: when it is not done in so many seconds.
            RuntimeError: with the last line that the process printed, when it failed.
        """
        if self._process.wait(seconds):
            raise RuntimeError(self._log.read_text().strip().rpartition("\n")[2])
        return sparc.load(self.artifact)


def measure(artifact: sparc.Artifact, sizes: Sizes | None = None, rounds: int = 30) -> dict[str, Any]:
    """Compare the compiled block with its program, and time CUDA graphs of several calls, against the block as it was.

    Args:
        artifact: what `compile_block` saved.
        sizes: of the block.
        rounds: of timing.

    Returns:
        `seconds` of one call by contender, `launches` by contender (None where they cannot be counted), `error` against
        the program in eager torch, and what `failed`.
    """
    chosen = sizes or Sizes()
    block, inputs = make_block(chosen), make_inputs(chosen)
    expected = artifact.program.run_flat(list(inputs))[0]
    given = [tensor.cuda() for tensor in inputs]
    found: dict[str, Any] = {"seconds": {}, "launches": {}, "failed": {}, "error": None}
    try:
        found["error"] = _relative(artifact.run_flat(given)[0].cpu(), expected)
    except Exception as caught:  # of the artifact as users call it; its module may still be timed
        found["failed"]["the artifact"] = said(caught)
    emission = artifact.emission
    assert isinstance(emission, TritonEmission)
    lowered = next(iter(emission.lowered.values()))
    ours = [_compiled(module_of(lowered, "cuda")) for _ in range(2)]
    dense = block.cuda()
    theirs = [_compiled(dense), _compiled(_copy(dense, chosen))]
    replays: dict[str, Replay] = {}
    for name, modules in (("ours", ours), ("torch.compile, one CUDA graph", theirs)):
        try:
            replays[name] = record([_call(modules[index % 2], given) for index in range(_REPEATS)])
            found["launches"][name] = launches(replays[name])
        except Exception as caught:  # one contender's failure leaves the other's time
            found["failed"][name] = said(caught)
    found["seconds"] = time_in_turns(replays, rounds)
    try:
        name = "torch.compile(reduce-overhead)"
        found["seconds"][name] = _overhead_reduced([dense, _copy(dense, chosen)], given, rounds)
    except Exception as caught:
        found["failed"][name] = said(caught)
    return found


def _relative(found: Tensor, expected: Tensor) -> float:
    difference = found.detach().double() - expected.detach().double()
    return float(difference.norm() / expected.detach().double().norm())


def _compiled(module: nn.Module) -> Callable[..., Any]:
    compiled: Callable[..., Any] = torch.compile(module, dynamic=False)
    return compiled


def _copy(block: Block, sizes: Sizes) -> Block:
    made = Block(sizes).half().eval().cuda()
    made.load_state_dict(block.state_dict())
    return made


def _call(module: Callable[..., Any], given: Sequence[Tensor]) -> Callable[[], Any]:
    return lambda: module(*given)


def _overhead_reduced(blocks: Sequence[Block], given: Sequence[Tensor], rounds: int) -> float:
    """The median seconds of a call of torch's own CUDA graphs, as a user gets them; launching them is in the time."""
    compiled = [torch.compile(block, mode="reduce-overhead", dynamic=False) for block in blocks]
    times: list[float] = []
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for index in range(rounds + 5):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.compiler.cudagraph_mark_step_begin()
            start.record()
            compiled[index % 2](*given)
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
    return sorted(times[5:])[rounds // 2]


def launches(replay: Replay) -> float | None:
    """Kernels that one call launches, copies of memory not counted; None where the profiler sees none."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        replay.graph.replay()
        torch.cuda.synchronize()
    names = [event.name for event in profile.events() if str(event.device_type).endswith("CUDA")]
    kernels = [name for name in names if not name.lower().startswith(("memcpy", "memset"))]
    return len(kernels) / replay.count if kernels else None


if __name__ == "__main__":
    compile_block(Path(sys.argv[1]), Sizes(), "cuda")
