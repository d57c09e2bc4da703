"""What every loss of pairs and triplets must pass: loops, order, precision, and batches with nothing to learn."""

import torch
from torch.func import grad, vmap

BAD_BATCHES = {  # name: (embeddings, labels); in those whose name starts with "no" there is nothing to compare
    "no negatives": (torch.eye(4), torch.zeros(4, dtype=torch.int64)),
    "no positives": (torch.eye(4), torch.arange(4)),
    "nobody else": (torch.ones(1, 4), torch.tensor([3])),
    "some without positives": (torch.eye(4) + 0.3, torch.tensor([0, 0, 1, 2])),
    "duplicates": (torch.tensor([[1.0, 2, 0, 1], [0, 1, 1, 0]]).repeat(3, 1), torch.tensor([0, 0, 1, 1, 0, 1])),
    "zero rows": (torch.eye(4) * torch.tensor([1.0, 0, 0, 2]), torch.tensor([0, 0, 1, 1])),
    "all zero": (torch.zeros(4, 3), torch.tensor([0, 0, 1, 1])),
    "far away": (1e4 * (torch.eye(4) + 0.1 * torch.arange(16.0).reshape(4, 4)), torch.tensor([0, 1, 0, 1])),
}


def sample(size=12, dim=5, classes=4, seed=0, dtype=torch.float64):
    """Embeddings around class centres, and labels in which each class occurs at least twice."""
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.arange(size) % classes)[torch.randperm(size, generator=generator)]
    centres = torch.randn(classes, dim, generator=generator, dtype=torch.float64)
    return (0.6 * centres[labels] + torch.randn(size, dim, generator=generator, dtype=torch.float64)).to(dtype), labels


def value_and_gradient(loss, embeddings, labels):
    embeddings = embeddings.clone().requires_grad_()
    values = loss(embeddings, labels)
    (gradient,) = torch.autograd.grad(values.mean(), embeddings)
    return values.detach(), gradient


def check_against_a_loop(loss, hypers, slopes_are_exact=True):
    """``loss(x, y, hyper)`` under ``vmap`` and ``vmap(grad)`` is a loop over members; its slopes are differences."""
    embeddings = torch.stack([sample(seed=seed)[0] for seed in range(2)])
    labels = torch.stack([sample(seed=seed)[1] for seed in range(2)])
    values = vmap(loss)(embeddings, labels, torch.tensor(hypers, dtype=torch.float64))
    both = grad(lambda x, y, h: loss(x, y, h).mean(), argnums=(0, 2))
    slopes, along = vmap(both)(embeddings, labels, torch.tensor(hypers, dtype=torch.float64))
    for member, hyper in enumerate(hypers):
        expected, slope = value_and_gradient(lambda x, y, h=hyper: loss(x, y, h), embeddings[member], labels[member])
        assert expected.shape == (12,)
        assert slope.abs().max() > 1e-4
        torch.testing.assert_close(values[member], expected, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(slopes[member], slope, rtol=1e-9, atol=1e-12)
        if slopes_are_exact:
            step = 1e-6 * torch.randn(12, 5, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
            ends = [loss(embeddings[member] + s * step, labels[member], hyper).mean() for s in (1, -1)]
            torch.testing.assert_close((slope * step).sum() * 2, ends[0] - ends[1], rtol=1e-5, atol=1e-13)
        ends = [loss(embeddings[member], labels[member], hyper + step).mean() for step in (1e-6, -1e-6)]
        torch.testing.assert_close(along[member], (ends[0] - ends[1]) / 2e-6, rtol=1e-5, atol=1e-8)


def check_order_and_precision(loss):
    """Examples may come in any order and labels have any names; float32 gives float32, and nearly the same."""
    embeddings, labels = sample()
    values, slope = value_and_gradient(loss, embeddings, labels)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(loss(embeddings[order], labels[order]), values[order], rtol=1e-11, atol=1e-12)
    single, single_slope = value_and_gradient(loss, embeddings.float(), labels)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), values, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(single_slope.double(), slope, rtol=2e-3, atol=2e-5)


def check_bad_batches(loss, comparing=True):
    """Finite values and gradients; 0 where there is nothing to compare (if the loss compares)."""
    for name, (embeddings, labels) in BAD_BATCHES.items():
        values, gradient = value_and_gradient(loss, embeddings, labels)
        assert values.shape == labels.shape, name
        assert values.isfinite().all(), name
        assert gradient.isfinite().all(), name
        if comparing and name.startswith("no"):
            assert values.abs().max() == 0, name
            assert gradient.abs().max() == 0, name
