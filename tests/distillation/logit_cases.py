"""What the tests of losses on logits share: examples, and a fleet under ``vmap`` against a loop."""

import torch
from torch.func import grad, vmap

from toolkit import random

MEMBERS, BATCH, CLASSES = 3, 7, 5
LABELS = torch.tensor([0, 1, 2, 3, 4, 1, 1])


def logits(seed: int, *shape: int, scale: float = 2.0) -> torch.Tensor:
    return scale * random.normal(random.key(seed), shape or (BATCH, CLASSES), torch.float64)


def check_against_a_loop(loss, hypers):
    """``loss(z, t, y, h)``: values, gradients in z and slopes in h under vmap are those of plain autograd, one by one.

    And the plain gradient is the difference quotient, so that nothing in it is cut off or counted twice.
    """
    z, t = logits(1, MEMBERS, BATCH, CLASSES), logits(2, MEMBERS, BATCH, CLASSES, scale=3)
    y = torch.stack([LABELS.roll(i) for i in range(MEMBERS)])
    h = torch.tensor(hypers, dtype=torch.float64)
    values = vmap(loss)(z, t, y, h)
    slopes = vmap(grad(lambda z, t, y, h: loss(z, t, y, h).mean()))(z, t, y, h)
    assert values.shape == (MEMBERS, BATCH)
    for i, hyper in enumerate(hypers):
        leaf = z[i].clone().requires_grad_()
        alone = loss(leaf, t[i], y[i], hyper)
        (slope,) = torch.autograd.grad(alone.mean(), leaf)
        torch.testing.assert_close(values[i], alone.detach(), rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(slopes[i], slope, rtol=1e-10, atol=1e-12)
        way = logits(3)
        ends = [loss(z[i] + step * way, t[i], y[i], hyper).mean() for step in (1e-6, -1e-6)]
        torch.testing.assert_close((slope * way).sum(), (ends[0] - ends[1]) / 2e-6, rtol=1e-6, atol=1e-8)
        assert slope.abs().max() > 1e-3
    single = loss(z[0].float(), t[0].float(), y[0], hypers[0])
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), values[0], rtol=1e-4, atol=1e-5)


def check_extremes(loss):
    """Logits of great size and of no spread: values and gradients are finite, in both precisions."""
    for dtype in (torch.float32, torch.float64):
        sure = torch.eye(CLASSES, dtype=dtype)[LABELS] * 300
        flat, some = torch.full_like(sure, 0.1), logits(4).to(dtype)
        for z, t in ((sure, -sure), (-sure, sure), (sure, sure), (flat, sure), (some, flat), (flat, flat)):
            leaf = z.clone().requires_grad_()
            values = loss(leaf, t, LABELS)
            (slope,) = torch.autograd.grad(values.sum(), leaf)
            assert values.isfinite().all()
            assert slope.isfinite().all()
            assert slope.abs().max() < 1e4
