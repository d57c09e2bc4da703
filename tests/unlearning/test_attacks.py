"""Membership attacks against scikit-learn, brute force, SciPy's Gaussians and fleets whose distribution is known."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import roc_auc_score, roc_curve
from torch.func import grad, vmap

from toolkit.unlearning.attacks import (
    attack_auc,
    lira,
    margins,
    membership_scores,
    population_attack,
    tpr_at_fpr,
    u_lira,
)

KINDS = ("confidence", "loss", "margin", "hinge", "entropy", "modified_entropy")
every_kind = pytest.mark.parametrize("kind", KINDS)


def normal(*shape, seed=0, scale=1.0, dtype=torch.float64):
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(dtype)


def labels_of(examples, classes, seed=1):
    return torch.randint(classes, (examples,), generator=torch.Generator().manual_seed(seed))


def plain_score(kind, row, label):
    """One example in NumPy, by the definition."""
    z = np.asarray(row, dtype=np.float64)
    p = np.exp(z) / np.exp(z).sum()
    others = np.delete(np.arange(len(z)), label)
    return {
        "confidence": p[label],
        "loss": np.log(p[label]),
        "margin": np.log(p[label] / (1 - p[label])),
        "hinge": z[label] - z[others].max(),
        "entropy": -stats.entropy(p),
        "modified_entropy": (1 - p[label]) * np.log(p[label]) + sum(p[k] * np.log(1 - p[k]) for k in others),
    }[kind]


@every_kind
@pytest.mark.parametrize("classes", [2, 5])
def test_scores_are_their_definition(kind, classes):
    logits, labels = normal(3, 7, classes, scale=2.0), labels_of(7, classes)
    expected = [[plain_score(kind, row, label) for row, label in zip(rows, labels, strict=True)] for rows in logits]
    torch.testing.assert_close(
        membership_scores(logits, labels, kind), torch.tensor(np.array(expected)), rtol=1e-11, atol=1e-12
    )


@every_kind
def test_scores_of_a_member_do_not_depend_on_the_others(kind):
    logits, labels = normal(4, 6, 5), labels_of(6, 5)
    together = membership_scores(logits, labels, kind)
    mapped = vmap(lambda z: membership_scores(z, labels, kind))(logits)
    torch.testing.assert_close(mapped, together)
    alone = torch.stack([membership_scores(logits[2, i : i + 1], labels[i : i + 1], kind)[0] for i in range(6)])
    torch.testing.assert_close(alone, together[2])


@every_kind
def test_scores_of_confident_logits_stay_finite_and_keep_their_gradient(kind):
    logits = torch.tensor([[200.0, 0.0, -50.0], [0.0, 200.0, -50.0]])
    labels = torch.tensor([0, 0])
    scores = membership_scores(logits, labels, kind)
    assert bool(scores.isfinite().all())
    assert scores.dtype == torch.float32
    slopes = grad(lambda z: membership_scores(z, labels, kind).sum())(logits)
    assert bool(slopes.isfinite().all())
    if kind in ("margin", "hinge", "loss", "modified_entropy"):
        right = {"margin": 200.0, "hinge": 200.0, "loss": 0.0, "modified_entropy": 0.0}[kind]
        wrong = {"margin": -200.0, "hinge": -200.0, "loss": -200.0, "modified_entropy": -400.0}[kind]
        torch.testing.assert_close(scores, torch.tensor([right, wrong]))


def mixed_up_columns(logits, labels):
    """The public mistake: the columns of the whole batch, and log p where log(1 - p) is meant."""
    p = logits.softmax(-1)
    log_p, reverse = p.log(), p.log()
    modified, swapped = p.clone(), reverse.clone()
    modified[:, labels] = 1 - p[:, labels]
    swapped[:, labels] = log_p[:, labels]
    return (modified * swapped).sum(-1)


def test_modified_entropy_is_not_what_mixed_up_columns_give():
    logits, labels = normal(6, 5, scale=2.0), labels_of(6, 5)
    score = membership_scores(logits, labels, "modified_entropy")
    mistaken = mixed_up_columns(logits, labels)
    assert (mistaken / score - 1).abs().max() > 0.5
    torch.testing.assert_close(membership_scores(logits[:2], labels[:2], "modified_entropy"), score[:2])
    assert not torch.allclose(mixed_up_columns(logits[:2], labels[:2]), mistaken[:2], rtol=0.05)  # batch-dependent


def test_confidence_loss_and_margin_are_one_population_attack():
    logits, labels = normal(3, 40, 4), labels_of(40, 4)
    inside = torch.arange(40) < 15
    areas = [attack_auc(membership_scores(logits, labels, kind), inside) for kind in ("confidence", "loss", "margin")]
    torch.testing.assert_close(areas[0], areas[1])
    torch.testing.assert_close(areas[1], areas[2])


def tables(seed=0, members=4, items=60, distinct=9):
    """Scores with many ties, and masks that differ between members."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(distinct, (members, items), generator=generator).double()
    return scores, torch.rand(members, items, generator=generator) < 0.3


def test_auc_is_brute_force_and_scikit_learn_with_ties():
    scores, inside = tables()
    for row, mask, area in zip(scores, inside, attack_auc(scores, inside), strict=True):
        difference = row[mask][:, None] - row[~mask]
        brute = ((difference > 0).double() + (difference == 0).double() / 2).mean()
        assert area.item() == pytest.approx(brute.item(), abs=1e-14)
        assert area.item() == pytest.approx(roc_auc_score(mask.numpy(), row.numpy()), abs=1e-14)


def test_auc_knows_infinite_scores_and_leaves_out_what_is_on_neither_side():
    scores = torch.tensor([math.inf, 1.0, math.inf, -math.inf, -math.inf, 77.0])
    inside = torch.tensor([True, True, False, False, False, False])
    outside = torch.tensor([False, False, True, True, True, False])
    # pairs: (inf, inf) 1/2, (inf, -inf) 1 twice, (1, inf) 0, (1, -inf) 1 twice
    assert attack_auc(scores, inside, outside).item() == pytest.approx(4.5 / 6)
    assert attack_auc(-scores, inside, outside).item() == pytest.approx(1.5 / 6)


def best_rate(scores, mask, fpr):
    """Over all thresholds, by trying each."""
    rates = []
    for threshold in [math.inf, *scores.tolist()]:
        if (scores[~mask] >= threshold).double().mean() <= fpr + 1e-12:
            rates.append((scores[mask] >= threshold).double().mean().item())
    return max(rates)


@pytest.mark.parametrize("fpr", [0.0, 0.05, 0.29, 0.5, 1.0])
def test_tpr_at_fpr_is_the_best_threshold_and_no_interpolation(fpr):
    for distinct in (9, 100000):
        scores, inside = tables(seed=3, distinct=distinct)
        rates = tpr_at_fpr(scores, inside, fpr=fpr)
        for row, mask, rate in zip(scores, inside, rates, strict=True):
            assert rate.item() == pytest.approx(best_rate(row, mask, fpr), abs=1e-14)
            false, true, _ = roc_curve(mask.numpy(), row.numpy(), drop_intermediate=False)
            assert rate.item() == pytest.approx(true[false <= fpr + 1e-12].max(), abs=1e-14)


def test_tpr_counts_a_rate_that_is_a_whole_number_of_items():
    scores = torch.cat([torch.full((1,), 71.5), torch.arange(100.0)])  # 28 outside items are above 71.5
    inside = torch.arange(101) == 0
    assert tpr_at_fpr(scores, inside, fpr=0.28).item() == 1
    assert tpr_at_fpr(scores, inside, fpr=0.27).item() == 0
    scores[0] = 70.5
    assert tpr_at_fpr(scores, inside, fpr=0.29).item() == 1  # 0.29 * 100 rounds to 28.999...


def test_rates_are_those_of_each_member_alone():
    scores, inside = tables()
    attack = population_attack(scores, inside, fpr=0.1)
    outside = ~inside
    mapped = vmap(lambda s, i, o: attack_auc(s, i, o))(scores, inside, outside)
    torch.testing.assert_close(mapped, attack.auc)
    torch.testing.assert_close(vmap(lambda s, i: tpr_at_fpr(s, i, fpr=0.1))(scores, inside), attack.tpr)
    single = torch.stack([attack_auc(s.float(), i) for s, i in zip(scores, inside, strict=True)])
    torch.testing.assert_close(single, attack.auc)
    shared = attack_auc(scores, inside[0])
    torch.testing.assert_close(shared[1], attack_auc(scores[1], inside[0]))


def test_auc_of_shifted_normals_is_its_closed_form():
    scores = normal(1, 40000)
    inside = torch.arange(40000) < 20000
    area = attack_auc(scores + inside * 1.3, inside)
    assert area.item() == pytest.approx(stats.norm.cdf(1.3 / math.sqrt(2)), abs=4 * 0.0025)


def test_auc_is_one_half_over_all_forget_sets_not_for_one():
    scores = normal(8)
    masks = [torch.tensor([i in chosen for i in range(8)]) for chosen in itertools.combinations(range(8), 3)]
    areas = attack_auc(scores.expand(len(masks), -1), torch.stack(masks))
    assert areas.mean().item() == pytest.approx(0.5, abs=1e-12)
    assert areas.amin().item() == 0
    assert areas.amax().item() == 1


def shadows_of(seed=0, shadows=50, examples=12):
    generator = torch.Generator().manual_seed(seed)
    inside = torch.rand(shadows, examples, generator=generator) < 0.5
    values = normal(shadows, examples, seed=seed + 1) * (1 + torch.arange(examples) / 4) + 5 * inside
    return values + 10 * torch.arange(examples), inside


def test_lira_is_two_gaussians_per_example():
    shadows, inside = shadows_of()
    target = shadows[:3] + 0.3
    online, offline = lira(target, shadows, inside), lira(target, shadows, inside, online=False)
    for j in range(shadows.shape[1]):
        with_it, without = shadows[inside[:, j], j].numpy(), shadows[~inside[:, j], j].numpy()
        x = target[:, j].numpy()
        own = stats.norm(with_it.mean(), with_it.std(ddof=1))
        other = stats.norm(without.mean(), without.std(ddof=1))
        np.testing.assert_allclose(online[:, j], own.logpdf(x) - other.logpdf(x), rtol=1e-11, atol=1e-11)
        np.testing.assert_allclose(stats.norm.sf(offline[:, j]), other.sf(x), rtol=1e-10)


def test_pooled_variance_is_within_examples_and_apart_for_in_and_out():
    shadows, inside = shadows_of()
    shadows = torch.where(inside, shadows * 1.0, shadows + 3 * normal(*shadows.shape, seed=9))  # out spreads wider
    target = shadows[:3] + 0.3
    centres, spreads = [], []
    for mask in (inside, ~inside):
        groups = [shadows[mask[:, j], j] for j in range(shadows.shape[1])]
        centres.append(torch.stack([group.mean() for group in groups]))
        squares = sum(((group - group.mean()) ** 2).sum() for group in groups)
        spreads.append((squares / sum(len(group) - 1 for group in groups)) ** 0.5)
    densities = [torch.distributions.Normal(c, s).log_prob(target) for c, s in zip(centres, spreads, strict=True)]
    torch.testing.assert_close(lira(target, shadows, inside, variance="pooled"), densities[0] - densities[1])
    shared = shadows[inside].std()  # the public mistake: one spread for both, differences between examples included
    mistaken = [torch.distributions.Normal(c, shared).log_prob(target) for c in centres]
    assert not torch.allclose(mistaken[0] - mistaken[1], densities[0] - densities[1], rtol=0.5)


def test_lira_finds_what_one_threshold_does_not():
    """Examples that differ far more from each other than membership moves them: N(c + μ, 1) against N(c, 1)."""
    models, examples, shift = 600, 100, 1.0
    generator = torch.Generator().manual_seed(5)
    inside = torch.rand(models, examples, generator=generator) < 0.5
    values = normal(models, examples, seed=6) + shift * inside + 30 * normal(examples, seed=7)
    scores = lira(values[:100], values[100:], inside[100:])
    strong = attack_auc(scores.T, inside[:100].T).mean().item()
    weak = attack_auc(values[:100], inside[:100]).mean().item()
    assert strong == pytest.approx(stats.norm.cdf(shift / math.sqrt(2)), abs=0.02)
    assert weak == pytest.approx(0.5, abs=0.04)
    offline = attack_auc(lira(values[:100], values[100:], inside[100:], online=False).T, inside[:100].T).mean().item()
    assert offline == pytest.approx(strong, abs=0.01)  # equal spreads: one direction is all there is


def test_u_lira_scores_a_fold_with_the_other_fold():
    unlearned, retrained = normal(7, 5) + 0.5, normal(8, 5, seed=1) * 1.4
    result = u_lira(unlearned, retrained)
    areas = []
    for fold in (0, 1):
        shadows = torch.cat([unlearned[1 - fold :: 2], retrained[1 - fold :: 2]])
        inside = (torch.arange(len(shadows)) < len(unlearned[1 - fold :: 2]))[:, None].expand(-1, 5)
        ours, theirs = lira(unlearned[fold::2], shadows, inside), lira(retrained[fold::2], shadows, inside)
        torch.testing.assert_close(result.unlearned[fold::2], ours)
        torch.testing.assert_close(result.retrained[fold::2], theirs)
        areas.append((ours[:, None] > theirs).double().mean((0, 1)))
    torch.testing.assert_close(result.auc, (areas[0] + areas[1]) / 2)


def test_u_lira_of_exact_unlearning_is_one_half_where_other_splits_are_not():
    examples, models = 4000, 12
    unlearned, retrained = normal(models, examples), normal(models, examples, seed=1)
    area = u_lira(unlearned, retrained).auc
    error = area.std().item() / math.sqrt(examples)
    assert abs(area.mean().item() - 0.5) < 3.5 * error
    assert abs(u_lira(unlearned, retrained, folds=4).auc.mean().item() - 0.5) < 3.5 * error
    both = torch.cat([unlearned, retrained])
    inside = (torch.arange(2 * models) < models)[:, None].expand(-1, examples)
    seen = attack_auc(lira(both, both, inside).T, inside.T)
    assert seen.mean().item() > 0.5 + 20 * error  # the Gaussians contain the model under attack
    left_out = torch.stack(
        [
            lira(both[i : i + 1], both[torch.arange(2 * models) != i], inside[torch.arange(2 * models) != i])[0]
            for i in range(2 * models)
        ]
    )
    assert attack_auc(left_out.T, inside.T).mean().item() < 0.5 - 10 * error


def test_u_lira_of_shifted_fleets_is_the_closed_form():
    unlearned, retrained = normal(256, 200) + 1.3, normal(256, 200, seed=1)
    area = u_lira(unlearned, retrained).auc
    assert area.mean().item() == pytest.approx(stats.norm.cdf(1.3 / math.sqrt(2)), abs=0.012)
    swapped = u_lira(retrained, unlearned).auc
    torch.testing.assert_close(swapped, area)  # the likelihood ratio knows the direction


def test_u_lira_uses_only_the_marked_models():
    unlearned, retrained = normal(12, 4) + 0.5, normal(14, 4, seed=1)
    marks = torch.rand(12, 4, generator=torch.Generator().manual_seed(0)) < 0.8
    wild = torch.where(marks, unlearned, 1e6)
    torch.testing.assert_close(
        u_lira(wild, retrained, forgotten=marks).auc, u_lira(unlearned, retrained, forgotten=marks).auc
    )
    whole = torch.ones(14, 4, dtype=torch.bool)
    torch.testing.assert_close(u_lira(unlearned, retrained, unseen=whole).auc, u_lira(unlearned, retrained).auc)
    few = torch.zeros(14, 4, dtype=torch.bool)
    few[:3] = True
    with pytest.raises(ValueError, match=r"unseen: expected at least 2 models of each kind per example, got 1"):
        u_lira(unlearned, retrained, unseen=few)


def test_models_that_are_all_alike_give_finite_scores():
    alike = torch.ones(6, 3)
    result = u_lira(alike, alike)
    assert result.auc.tolist() == [0.5] * 3
    assert u_lira(alike, 2 * alike).auc.tolist() == [1.0] * 3
    assert bool(u_lira(alike, 2 * alike).unlearned.isfinite().all())


def test_bad_input_is_named():
    scores, mask = torch.zeros(2, 4), torch.tensor([True, True, False, False])
    with pytest.raises(ValueError, match="inside: expected at least one item"):
        attack_auc(scores, torch.zeros(2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="outside: expected at least one item"):
        tpr_at_fpr(scores, torch.ones(4, dtype=torch.bool))
    with pytest.raises(ValueError, match="outside: expected no item that is inside"):
        attack_auc(scores, mask, mask)
    with pytest.raises(ValueError, match="scores: expected values that are not NaN, got 8"):
        attack_auc(scores * math.nan, mask)
    with pytest.raises(ValueError, match="fpr"):
        tpr_at_fpr(scores, mask, fpr=1.2)
    with pytest.raises(ValueError, match="logits: expected finite values"):
        margins(torch.full((2, 3), math.inf), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="labels: expected class indices from 0 to 2"):
        membership_scores(torch.zeros(2, 3), torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="at least 2 classes"):
        margins(torch.zeros(2, 1), torch.tensor([0, 0]))
    with pytest.raises(ValueError, match="inside: expected at least 2 models"):
        lira(torch.zeros(1, 2), torch.zeros(3, 2), torch.tensor([[True, False]] * 3))
    with pytest.raises(ValueError, match="folds: expected at least 2"):
        u_lira(torch.zeros(3, 2), torch.zeros(9, 2))
