"""The GPU benchmark's results as a short table, and as JSON."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from benchmarks.results import FOLDER
from sparc.serialize.records import finite

FLOAT16 = "torch float16"
_NOT_OURS = ("ours", "ours, atomic")


def render(result: Mapping[str, Any]) -> str:
    """The table: a line for each encoding, and below it what else was found.

    For each number of tokens it says the time over the floor, and torch's float16 time over ours, as geometric means
    over the layers that were measured.
    """
    lines = [f"== {result['device']} =="]
    sections: Mapping[str, Any] = result["sections"]
    for name in ("numerics", "linears", "block", "onnx"):
        section = sections.get(name)
        if section is None:
            continue
        if "error" in section and isinstance(section["error"], str):
            lines.append(f"{name}: failed: {section['error']}")
        else:
            lines += _RENDERERS[name](section)
    return "\n".join(lines)


def save(result: Mapping[str, Any], *folders: Path) -> list[Path]:
    """Write `gpu-<device>.json` into folders; numbers that are not finite become strings.

    Args:
        result: what was measured; `device` names the file.
        folders: where to; `benchmarks/results` by default.
    """
    name = re.sub(r"[^a-z0-9]+", "-", str(result["device"]).lower()).strip("-")
    text = json.dumps(finite(result), indent=1, allow_nan=False) + "\n"
    written = []
    for folder in folders or (FOLDER,):
        folder.mkdir(parents=True, exist_ok=True)
        written.append(folder / f"gpu-{name}.json")
        written[-1].write_text(text)
    return written


# sections -------------------------------------------------------------------------------------------------------------
def _numerics(section: Mapping[str, Any]) -> list[str]:
    failures: Sequence[str] = section["failures"]
    lines = [f"numerics: {section['checked'] - len(failures)} of {section['checked']} kernels are right"]
    lines += [f"  wrong: {each}" for each in failures[:20]]
    if len(failures) > 20:
        lines.append(f"  and {len(failures) - 20} more")
    return lines + [f"  no lowering: {name}: {why}" for name, why in section["no_lowering"].items()]


def _linears(section: Mapping[str, Any]) -> list[str]:
    rows: Sequence[Mapping[str, Any]] = section["rows"]
    tokens = sorted({row["tokens"] for row in rows})
    lines = ["linears: time / floor, and torch's float16 time / ours"]
    lines.append(f"  {'':<12}" + "".join(f"{f'M={number}':>15}" for number in tokens))
    for case in dict.fromkeys(row["case"] for row in rows):
        cells = [_cell([row for row in rows if (row["case"], row["tokens"]) == (case, each)]) for each in tokens]
        lines.append(f"  {case:<12}" + "".join(f" {cell:>14}" for cell in cells))
    lines += _peers(rows, tokens)
    atomic = [row["seconds"] for row in rows if "ours, atomic" in row.get("seconds", {})]
    if atomic:
        ratio = geometric_mean(each["ours, atomic"] / each["ours"] for each in atomic)
        lines.append(f"  atomic / deterministic, where split: {ratio:.2f} of {len(atomic)}")
    broken = [f"{row['case']}, {row['layer']}, {row['tokens']} tokens: {why}" for row, why in _own_failures(rows)]
    lines += [f"  failed: {each}" for each in broken[:10]]
    if section["not_reached"]:
        lines.append(f"  no time for {len(section['not_reached'])}, the first {section['not_reached'][0]}")
    return lines


def _cell(rows: Sequence[Mapping[str, Any]]) -> str:
    timed = [row for row in rows if "ours" in row.get("seconds", {})]
    if not timed:
        return "–"
    over = geometric_mean(row["seconds"]["ours"] / row["floor"] for row in timed)
    known = [row["seconds"][FLOAT16] / row["seconds"]["ours"] for row in timed if FLOAT16 in row["seconds"]]
    return f"{over:.2f}  {geometric_mean(known):.2f}×" if known else f"{over:.2f}"


def _peers(rows: Sequence[Mapping[str, Any]], tokens: Iterable[int]) -> list[str]:
    """Each peer's time over ours; or why there is none."""
    lines: list[str] = []
    named = dict.fromkeys(
        name for row in rows for name in (*row.get("seconds", {}), *row.get("failed", {})) if _is_peer(name)
    )
    for name in named:
        cells = []
        for number in tokens:
            timed = [row["seconds"] for row in rows if row["tokens"] == number and name in row.get("seconds", {})]
            if timed:
                cells.append(f"M={number} {geometric_mean(each[name] / each['ours'] for each in timed):.2f}×")
        why = next((row["failed"][name] for row in rows if name in row.get("failed", {})), "not timed")
        lines.append(f"  {name} / ours: {', '.join(cells) or why}")
    return lines


def _is_peer(name: str) -> bool:
    return name not in (*_NOT_OURS, FLOAT16) and not name.startswith("configuration")


def _own_failures(rows: Iterable[Mapping[str, Any]]) -> list[tuple[Mapping[str, Any], str]]:
    return [(row, why) for row in rows for name, why in row.get("failed", {}).items() if name in (*_NOT_OURS, FLOAT16)]


def _block(section: Mapping[str, Any]) -> list[str]:
    error = section["error"]
    lines = ["Llama-3-8B block, one token" + (f": error {error:.1e}" if error is not None else "")]
    for name, seconds in section["seconds"].items():
        counted = section["launches"].get(name)
        count = f", {counted:g} launches" if counted is not None else ""
        lines.append(f"  {name}: {seconds * 1e6:.1f} µs{count}")
    return lines + [f"  {name} failed: {why}" for name, why in section["failed"].items()]


def _onnx(section: Mapping[str, Any]) -> list[str]:
    errors = ", ".join(f"{recipe} {error:.1e}" for recipe, error in section.get("recipes", {}).items())
    return [f"onnx:cuda in onnxruntime-gpu: {section['status']}" + (f", errors {errors}" if errors else "")]


_RENDERERS = {"numerics": _numerics, "linears": _linears, "block": _block, "onnx": _onnx}
