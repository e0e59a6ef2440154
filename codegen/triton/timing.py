"""Times on the GPU: functions recorded in CUDA graphs, on weights that no cache holds, in turns, as medians."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch

COLD_BYTES = 150_000_000  # more than any second-level cache holds
_AHEAD_CYCLES = 400_000  # that the GPU waits while launches queue up, so that none of them is waited for


@dataclass(frozen=True)
class Replay:
    """A recorded graph that does the same several times, each on weights of its own."""

    graph: torch.cuda.CUDAGraph
    count: int


def copies_of(nbytes: int) -> int:
    """How many copies of weights of this size are more than caches hold."""
    return COLD_BYTES // max(nbytes, 1) + 2


def record(functions: Sequence[Callable[[], object]]) -> Replay:
    """A graph of all functions, one after another; they are called twice before."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(stream):
        for function in (*functions, *functions):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        for function in functions:
            function()
    return Replay(graph, len(functions))


def time_in_turns(replays: Mapping[str, Replay], rounds: int = 30) -> dict[str, float]:
    """The median seconds of one function of each graph; every other round goes backwards."""
    names = list(replays)
    times: dict[str, list[float]] = {name: [] for name in names}
    for replay in replays.values():
        replay.graph.replay()
    torch.cuda.synchronize()
    for index in range(rounds):
        events = {}
        for name in names if index % 2 == 0 else names[::-1]:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda._sleep(_AHEAD_CYCLES)
            start.record()
            replays[name].graph.replay()
            end.record()
            events[name] = start, end
        torch.cuda.synchronize()
        for name, (start, end) in events.items():
            times[name].append(start.elapsed_time(end) / 1e3 / replays[name].count)
    return {name: median(values) for name, values in times.items()}
