"""Train a small GPT with and without a V-cycle through a coarser level, and say what that saves at equal loss.

python -m examples.vcycle [--quick] [--folder out]

The V-cycle (Multi-Level Framework, arXiv 2404.07999): train a little, coalesce to half the width and half the depth,
train that, decoalesce, interpolate with the model before, train on. Both ways see the same text and spend the same
floating-point operations; the learning rate is the one that is best without a V-cycle. It stays constant after a
warm-up, so that every point of a curve is a fair end of training. Budgets of minutes favour small models, and with them
the V-cycle: what it saves here says nothing about long training, where the paper reports about a fifth.
"""

import csv
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

import sparc
from examples.curves import Curve, write_svg
from examples.models.texts import GENRES, calibration_text, held_out_text

Log = Callable[[str], None]


@dataclass(frozen=True)
class Setting:
    """Sizes of a comparison.

    Args:
        features: size of the residual stream.
        layers: how many layers.
        heads: heads of each.
        context: bytes of text in a window.
        batch: windows in a step.
        steps: steps of training without a V-cycle; the V-cycle spends as many operations.
        start: the part of them before coalescing.
        small: steps of the small model, as a part of `steps`.
        alpha: how much of the decoalesced model is mixed in.
        small_rate: the small model's learning rate, in multiples of the large one's.
        rates: learning rates to choose from.
        every: steps between two points of a curve.
        windows: batches of held-out text that the loss is measured on.
        seeds: repetitions.
    """

    features: int = 96
    layers: int = 6
    heads: int = 4
    context: int = 64
    batch: int = 16
    steps: int = 600
    start: float = 0.1
    small: float = 0.7
    alpha: float = 0.5
    small_rate: float = 2.0
    rates: tuple[float, ...] = (1e-3, 2e-3, 4e-3)
    every: int = 25
    windows: int = 12
    seeds: tuple[int, ...] = (0, 1, 2)


QUICK = Setting(
    features=32, layers=4, context=32, batch=8, steps=60, rates=(2e-3, 4e-3), every=10, windows=4, seeds=(0,)
)


class Block(nn.Module):
    """A layer of a GPT: causal attention and a feed-forward layer, each behind a norm."""

    def __init__(self, features: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(features), nn.LayerNorm(features)
        self.query, self.key, self.value, self.out = (nn.Linear(features, features) for _ in range(4))
        self.up, self.down = nn.Linear(features, 4 * features), nn.Linear(4 * features, features)

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, context, features]` to the same."""
        y = self.norm1(x)
        query, key, value = (
            layer(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(-2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class TextModel(nn.Module):
    """A GPT over bytes, with learned positions and a head tied to the embedding."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        self.tokens = nn.Embedding(256, setting.features)
        self.positions = nn.Parameter(0.02 * torch.randn(setting.context, setting.features))
        self.blocks = nn.ModuleList(Block(setting.features, setting.heads) for _ in range(setting.layers))
        self.norm = nn.LayerNorm(setting.features)
        nn.init.normal_(self.tokens.weight, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        """Bytes `[batch, context]` to logits `[batch, context, 256]`."""
        x = self.tokens(ids) + self.positions
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.tokens.weight)


class Text:
    """Windows of training text in a random order, and held-out ones."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._train = _bytes(held_out_text(genre) for genre in GENRES)  # the larger part of the shipped texts
        held_out = _bytes(calibration_text(genre) for genre in GENRES)
        count, size = setting.windows * setting.batch, setting.context + 1
        starts = torch.linspace(0, len(held_out) - size, count).long()
        self.held_out = held_out[starts[:, None] + torch.arange(size)].split(setting.batch)

    def batches(self, seed: int) -> Iterator[Tensor]:
        """Endless batches `[batch, context + 1]`."""
        generator = torch.Generator().manual_seed(seed)
        size = self._setting.context + 1
        while True:
            starts = torch.randint(len(self._train) - size, (self._setting.batch, 1), generator=generator)
            yield self._train[starts + torch.arange(size)]


def _bytes(texts: Iterator[str]) -> Tensor:
    return torch.tensor(list("\n\n".join(texts).encode()), dtype=torch.long)


def step_operations(program: sparc.Program) -> int:
    """Floating-point operations of a training step: three times those of the products and of attention forwards."""
    total = 0
    for node in program.graph.nodes:
        if node.target is torch.ops.aten.linear.default:
            total += 2 * node.meta["val"].numel() * node.args[1].meta["val"].shape[1]
        elif node.target is torch.ops.aten.scaled_dot_product_attention.default:
            total += 4 * node.meta["val"].numel() * node.args[1].meta["val"].shape[-2]
    return 3 * total


def _loss(module: nn.Module, windows: Tensor) -> Tensor:
    logits: Tensor = module(windows[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


@dataclass
class Run:
    """A training run: the model's program, its operations so far, and the curve of held-out losses."""

    program: sparc.Program
    setting: Setting
    text: Text
    batches: Iterator[Tensor]
    curve: Curve
    operations: float = 0.0
    resumed: float = 0.0  # operations before the large model was trained on

    def train(self, steps: int, rate: float) -> None:
        """Train for some steps with AdamW at a constant rate after a warm-up."""
        module = self.program.module(train=True)
        optimizer = torch.optim.AdamW(module.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.01)
        warm_up = max(1, min(steps, self.setting.steps // 20))
        cost = step_operations(self.program)
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1.0, (step + 1) / warm_up)
            optimizer.zero_grad()
            _loss(module, next(self.batches)).backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            self.operations += cost
            if (step + 1) % self.setting.every == 0 or step + 1 == steps:
                self.curve.add(self.operations, self._held_out(module))
        self.program = module.to_program()

    def _held_out(self, module: nn.Module) -> float:
        with torch.no_grad():
            return mean(float(_loss(module, windows)) for windows in self.text.held_out)


def start(setting: Setting, text: Text, seed: int, name: str) -> Run:
    """A run that has not begun."""
    torch.manual_seed(seed)
    example = torch.zeros(setting.batch, setting.context, dtype=torch.long)
    program = sparc.capture(TextModel(setting).eval(), (example,))
    return Run(program, setting, text, text.batches(seed), Curve(name))


def plainly(setting: Setting, text: Text, seed: int, rate: float) -> Run:
    """Train without a V-cycle."""
    run = start(setting, text, seed, f"plain, seed {seed}")
    run.train(setting.steps, rate)
    return run


def with_cycle(setting: Setting, text: Text, seed: int, rate: float) -> Run:
    """Train with a V-cycle, for as many operations as without."""
    run = start(setting, text, seed, f"V-cycle, seed {seed}")
    budget = setting.steps * step_operations(run.program)
    run.train(round(setting.start * setting.steps), rate)
    big = run.program
    run.program, level = sparc.coalesce(big, width=2, depth=2)
    run.train(round(setting.small * setting.steps), setting.small_rate * rate)
    run.program = sparc.interpolate(big, sparc.decoalesce(run.program, level), setting.alpha)
    run.resumed = run.operations
    run.train(int((budget - run.operations) / step_operations(big)), rate)
    return run


@dataclass(frozen=True)
class Result:
    """What came out for one seed.

    Args:
        plain: the curve without a V-cycle.
        cycle: the curve with one.
        resumed: the operations before its large model was trained on; only what follows counts as reached, since a
            small model that is as good is another result.
    """

    plain: Curve
    cycle: Curve
    resumed: float = 0.0

    @property
    def saved(self) -> float | None:
        """The part of the operations that the V-cycle did not need for the least loss without it; None when it never
        got there.
        """
        reached = self.cycle.reached(self.plain.least, self.resumed)
        return None if reached is None else 1 - reached / self.plain.when_least

    @property
    def end(self) -> float:
        """The least loss of the V-cycle's large model."""
        return min(y for x, y in self.cycle.points if x > self.resumed)


def compare(setting: Setting, log: Log = print) -> tuple[float, list[Result]]:
    """Choose the learning rate without a V-cycle, and train both ways for every seed; returns the rate and results."""
    text, seeds = Text(setting), setting.seeds
    tried = {rate: plainly(setting, text, seeds[0], rate).curve for rate in setting.rates}
    for rate, curve in tried.items():
        log(f"learning rate {rate:g}: held-out loss {curve.least:.4f}")
    rate = min(tried, key=lambda each: tried[each].least)
    results = []
    for seed in seeds:
        plain = tried[rate] if seed == seeds[0] else plainly(setting, text, seed, rate).curve
        cycle = with_cycle(setting, text, seed, rate)
        results.append(Result(plain, cycle.curve, cycle.resumed))
        log(f"seed {seed}: {plain.least:.4f} plainly, {results[-1].end:.4f} with a V-cycle")
    return rate, results


def conclusion(results: Sequence[Result]) -> str:
    """What was saved, in a sentence."""
    saved = [result.saved for result in results]
    reached = [each for each in saved if each is not None]
    losses = mean(result.end - result.plain.least for result in results)
    equal = f"At equal operations the held-out loss differs by {losses:+.4f} on average."
    if len(reached) < len(saved):
        return f"{len(saved) - len(reached)} of {len(saved)} V-cycles never reached the plain run's loss. {equal}"
    spread = f" ± {100 * stdev(reached):.0f}" if len(reached) > 1 else ""
    return f"The V-cycle saved {100 * mean(reached):.0f}{spread} % of the operations at equal loss. {equal}"


def show(results: Sequence[Result], folder: Path) -> None:
    """Print the table, and write `vcycle.csv` (every point) and `vcycle.svg` (the curves)."""
    table = Table("seed", "plain", "V-cycle", "saved at equal loss", title="least held-out loss (nats per byte)")
    for index, result in enumerate(results):
        saved = "never reached" if result.saved is None else f"{100 * result.saved:.0f} %"
        table.add_row(str(index), f"{result.plain.least:.4f}", f"{result.end:.4f}", saved)
    Console().print(table)
    print(conclusion(results))
    folder.mkdir(parents=True, exist_ok=True)
    curves = list(itertools.chain.from_iterable((result.plain, result.cycle) for result in results))
    with (folder / "vcycle.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("run", "operations", "held-out loss"))
        writer.writerows((curve.name, f"{x:.6g}", f"{y:.6f}") for curve in curves for x, y in curve.points)
    colors = ("#888888", "#0a7d5a")
    write_svg(
        folder / "vcycle.svg",
        [(curve, colors[index % 2]) for index, curve in enumerate(curves)],
        "floating-point operations",
        "held-out loss, nats per byte (grey: plain, green: V-cycle)",
    )


def main(quick: bool = False, folder: Path = Path("out"), steps: int = 0) -> None:
    """Compare and show; `--quick` is a smoke test whose figures mean nothing."""
    setting = QUICK if quick else Setting()
    if steps:
        setting = replace(setting, steps=steps)
    started = time.perf_counter()
    rate, results = compare(setting)
    print(f"learning rate {rate:g}; {math.ceil(time.perf_counter() - started)} s")
    show(results, folder)


if __name__ == "__main__":
    typer.run(main)
