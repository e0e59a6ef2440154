"""The V-cycle example: what it counts, what it concludes, and that every part of a quick run is there."""

import csv
from dataclasses import replace

import pytest
import torch

import sparc
from examples import vcycle
from examples.curves import Curve


@pytest.fixture(scope="module")
def results():
    setting = replace(vcycle.QUICK, steps=30)
    lines = []
    rate, results = vcycle.compare(setting, lines.append)
    assert rate in setting.rates
    assert len(lines) == len(setting.rates) + len(setting.seeds)
    return results


def test_both_ways_learn_for_the_same_operations(results):
    (result,) = results
    for curve in (result.plain, result.cycle):
        operations, losses = zip(*curve.points, strict=True)
        assert list(operations) == sorted(operations)
        assert losses[-1] < 0.9 * losses[0]
    ends = [curve.points[-1][0] for curve in (result.plain, result.cycle)]
    assert ends[1] <= ends[0] < 1.1 * ends[1]


def test_what_is_shown_and_written(results, tmp_path, capsys):
    vcycle.show(results, tmp_path)
    assert vcycle.conclusion(results) in capsys.readouterr().out.replace("\n", " ")
    with (tmp_path / "vcycle.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == sum(len(curve.points) for result in results for curve in (result.plain, result.cycle))
    assert (tmp_path / "vcycle.svg").read_text(encoding="utf-8").count("<polyline") == 2


def test_operations_of_a_step():
    """Twice the products' multiplications and additions, and three times that for the gradients."""
    setting = vcycle.QUICK
    run = vcycle.start(setting, vcycle.Text(setting), 0, "")
    tokens, size = setting.batch * setting.context, setting.features
    products = setting.layers * 12 * size * size + 256 * size
    attention = setting.layers * 2 * setting.context * size
    assert vcycle.step_operations(run.program) == 6 * tokens * (products + attention)
    small, _ = sparc.coalesce(run.program)
    assert vcycle.step_operations(small) < 0.3 * vcycle.step_operations(run.program)


def test_a_level_keeps_the_loss_when_features_are_copied():
    setting = vcycle.QUICK
    run = vcycle.start(setting, vcycle.Text(setting), 0, "")
    run.program, level = sparc.coalesce(run.program, depth=1)
    run.train(3, 1e-3)
    grown = sparc.decoalesce(run.program, level)
    ids = run.text.held_out[0][:, :-1]
    assert torch.allclose(run.program.run(ids), grown.run(ids), atol=1e-4)


def test_savings_are_read_off_the_curves():
    plain = Curve("plain", [(1, 3.0), (2, 2.0), (4, 1.5)])
    good, bad = Curve("good", [(1, 2.5), (3, 0.5)]), Curve("bad", [(1, 2.5), (4, 1.6)])
    assert good.reached(1.5) == 2
    assert vcycle.Result(plain, good).saved == 0.5
    assert vcycle.Result(plain, bad).saved is None
    assert vcycle.Result(plain, good, resumed=2.5).saved == 0.25  # a small model that is as good does not count
    assert "saved 50 % of" in vcycle.conclusion([vcycle.Result(plain, good)])
    assert "1 of 2 V-cycles never reached" in vcycle.conclusion([vcycle.Result(plain, good), vcycle.Result(plain, bad)])
