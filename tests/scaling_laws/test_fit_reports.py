"""Reports on planted cases: an undetermined floor is named, a bent law is noticed, a flat direction is flat."""

import math
from typing import Any

import pytest
import torch

from toolkit import random
from toolkit.scaling_laws.fit_reports import extrapolation_score, identifiability, residual_report
from toolkit.scaling_laws.fitting import CHINCHILLA, POWER_LAW, fit_law

U = random.uniform(random.key(31), (2, 200), torch.float64)
N, D = 10 ** (7.5 + 2.7 * U[0]), 10 ** (9 + 3 * U[1])
NOISE = (0.006 * random.normal(random.key(32), (200,), torch.float64)).exp()
LOSSES = (1.82 + 480 * N**-0.348 + 2100 * D**-0.366) * NOISE
OPTIONS: dict[str, Any] = {"objective": "log_squares", "outliers": "keep"}


def fit(losses=LOSSES, sizes=None, terms=CHINCHILLA):
    return fit_law(sizes or {"N": N, "D": D}, losses, terms, **OPTIONS)


def test_wide_sweeps_determine_every_parameter_and_the_flat_direction_is_flat():
    found = fit()
    report = identifiability(found)
    assert report.unknown == ()
    assert "Every parameter is determined" in str(report)
    assert report.condition > 1e4 > report.condition_centred
    assert max(map(abs, report.flat.values())) == pytest.approx(0.1)
    step = 1e-3  # the law itself, moved along the direction
    p, moved = found.parameters, {}
    for name, value in p.items():
        moved[name] = value + step * report.flat[name] * (1 if name.startswith("alpha") else value)

    def law(q):
        return q["E"] + q["A_N"] * N ** -q["alpha_N"] + q["A_D"] * D ** -q["alpha_D"]

    change = (law(moved) / law(p)).log() / step
    assert float(change.square().mean().sqrt()) == pytest.approx(report.flat_effect, rel=0.02)
    straight = p | {"A_N": p["A_N"] * math.exp(step * 0.1)}
    assert report.flat_effect < 0.1 * float((law(straight) / law(p)).log().square().mean().sqrt() / step)


def test_a_floor_that_a_narrow_range_cannot_tell_is_named():
    x = torch.logspace(6, 6.5, 12, dtype=torch.float64)
    report = identifiability(fit((1.5 + 30 * x**-0.2) * NOISE[:12], {"N": x}, POWER_LAW))
    assert "E" in report.unknown
    assert "E cannot be told from these sizes" in report.words
    assert "N spans 0.5 decades" in report.words
    assert report.condition_centred > 1e3


def test_residuals_notice_scatter_tails_and_a_bend():
    report = residual_report(fit())
    assert report.rms == pytest.approx(0.006, rel=0.15)
    assert report.spread == pytest.approx(0.006, rel=0.2)
    assert report.r2 > 0.99
    assert report.tails < 0.02
    assert all(abs(bend) < 3 for bend in report.bend.values())
    centred = N.log() - N.log().mean()
    bent = residual_report(fit(LOSSES * (0.02 * centred.square() * (1 + 0.5 * centred)).exp()))
    assert abs(bent.bend["N"]) > 5
    assert abs(bent.bend["N"]) > 3 * abs(bent.bend["D"])
    spoiled = LOSSES * torch.where(torch.arange(200) < 20, 1.2, 1.0)
    assert (
        residual_report(fit_law({"N": N, "D": D}, spoiled, CHINCHILLA, objective="log_huber", outliers="keep")).tails
        > 0.09
    )


def test_extrapolation_scores_what_was_held_out():
    largest = N * D > 1e20
    sizes = {"N": N, "D": D}
    score = extrapolation_score(sizes, LOSSES, CHINCHILLA, largest, **OPTIONS)
    error = (score.fit.predict(sizes) / LOSSES).log()
    assert score.outside == pytest.approx(float(error[largest].square().mean().sqrt()), rel=1e-9)
    assert score.inside == pytest.approx(float(error[~largest].square().mean().sqrt()), rel=1e-9)
    assert score.bias == pytest.approx(float(error[largest].mean()), rel=1e-9)
    assert score.fit.points == int((~largest).sum())
    moved = torch.where(largest, LOSSES * 0.9, LOSSES)  # larger runs do better than the law
    worse = extrapolation_score(sizes, moved, CHINCHILLA, largest, **OPTIONS)
    assert worse.bias == pytest.approx(score.bias - math.log(0.9), rel=1e-6)
    with pytest.raises(ValueError, match="held_out"):
        extrapolation_score(sizes, LOSSES, CHINCHILLA, largest & ~largest, **OPTIONS)
    with pytest.raises(ValueError, match="losses"):
        extrapolation_score(sizes, torch.where(largest, -1.0, LOSSES), CHINCHILLA, largest, **OPTIONS)
    with pytest.raises(ValueError, match="more points than the 5"):
        extrapolation_score(sizes, LOSSES, CHINCHILLA, torch.arange(200) > 3, **OPTIONS)
