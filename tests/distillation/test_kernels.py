"""The closed-form inner solver against direct solves, quadrature and finite differences."""

import math

import pytest
import torch

from toolkit import random
from toolkit.data import digits
from toolkit.distillation.kernels import kernel_points, kernel_points_loss, kernel_ridge, relu_tangent_kernel

A = random.normal(random.key(1), (6, 5), torch.float64)
B = random.normal(random.key(2), (4, 5), torch.float64)
TARGETS = random.normal(random.key(3), (6, 2), torch.float64)


def linear(a, b):
    return a @ b.mT


def quadrature(a, b, depth):
    """Both expectations over a pair of normal variables, by the angle on a fine circle (r² has mean 2)."""
    grid = (torch.arange(200_000, dtype=torch.float64) + 0.5) * 2 * math.pi / 200_000
    saa, sbb, sab = (float(v) / len(a) for v in (a @ a, b @ b, a @ b))
    theta = sab
    for _ in range(depth):
        angle = math.acos(sab / math.sqrt(saa * sbb))
        both = (grid.cos() > 0) & ((grid - angle).cos() > 0)
        sab = 2 * math.sqrt(saa * sbb) * float((2 * grid.cos() * (grid - angle).cos() * both).mean())
        theta = sab + theta * 2 * float(both.double().mean())
    return theta


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_the_tangent_kernel_is_that_of_quadrature(depth):
    kernel = relu_tangent_kernel(A, B, depth)
    for i in range(3):
        for j in range(3):
            assert kernel[i, j].item() == pytest.approx(quadrature(A[i], B[j], depth), abs=3e-5)


def test_the_tangent_kernel_of_a_row_with_itself_its_opposite_and_nothing():
    square = A.square().mean(1)
    for depth in (1, 3):
        own = relu_tangent_kernel(A, A, depth)
        torch.testing.assert_close(own.diagonal(), (depth + 1) * square, rtol=1e-6, atol=0)
        torch.testing.assert_close(own, own.mT)
        assert torch.linalg.eigvalsh(own).min() > 0
    assert relu_tangent_kernel(A[:1], -A[:1]).abs().max() < 1e-6
    zero = torch.zeros(1, 5, dtype=torch.float64)
    assert torch.equal(relu_tangent_kernel(zero, A).abs() < 1e-100, torch.ones(1, 6, dtype=torch.bool))
    torch.testing.assert_close(relu_tangent_kernel(3 * A, B), 3 * relu_tangent_kernel(A, B))
    torch.testing.assert_close(
        relu_tangent_kernel(A.float(), B.float()).double(), relu_tangent_kernel(A, B), rtol=1e-4, atol=1e-5
    )


def test_a_wide_net_at_its_start_has_this_kernel():
    width = 100_000
    w = random.normal(random.key(4), (width, 5), torch.float64)
    v = random.normal(random.key(5), (width,), torch.float64)
    ha, hb = ((x @ w.T) / 5**0.5 for x in (A, B))
    last = 2 / width * ha.relu() @ hb.relu().T
    first = 2 / width * ((ha > 0) * v) @ ((hb > 0) * v).T * (A @ B.T) / 5
    torch.testing.assert_close(last + first, relu_tangent_kernel(A, B), rtol=0, atol=0.03)


def test_kernel_ridge_is_a_direct_solve_and_for_a_linear_kernel_the_primal_one():
    points, queries, ridge = linear(A, A), linear(B, A), 0.3
    strength = ridge * float(A.square().sum()) / 6
    direct = queries @ torch.linalg.inv(points + strength * torch.eye(6).double()) @ TARGETS
    torch.testing.assert_close(kernel_ridge(points, TARGETS, queries, ridge), direct)
    primal = torch.linalg.solve(A.T @ A + strength * torch.eye(5).double(), A.T @ TARGETS)
    torch.testing.assert_close(kernel_ridge(points, TARGETS, queries, ridge), B @ primal)
    torch.testing.assert_close(kernel_ridge(9 * points, TARGETS, 9 * queries, ridge), direct)


def test_the_loss_is_0_where_the_points_are_the_data_and_half_the_targets_square_where_they_say_nothing():
    assert kernel_points_loss(A, TARGETS, A, TARGETS, 1e-12).item() == pytest.approx(0, abs=1e-18)
    nothing = kernel_points_loss(A, torch.zeros_like(TARGETS), A, TARGETS)
    torch.testing.assert_close(nothing, TARGETS.square().sum() / 12)


@pytest.mark.parametrize("kernel", [relu_tangent_kernel, linear])
def test_the_gradient_through_the_solver_is_that_of_finite_differences(kernel):
    """The diagonal, where arccos has no slope, is the linear part times depth + 1: differences know it too."""
    points = B.clone().requires_grad_()
    y = random.normal(random.key(6), (4, 2), torch.float64)
    (slope,) = torch.autograd.grad(kernel_points_loss(points, y, A, TARGETS, 0.1, kernel), points)
    for i, j in ((0, 0), (2, 3), (3, 1)):
        step = torch.zeros_like(B)
        step[i, j] = 1e-5
        ends = [kernel_points_loss(B + sign * step, y, A, TARGETS, 0.1, kernel) for sign in (1, -1)]
        assert slope[i, j].item() == pytest.approx(float(ends[0] - ends[1]) / 2e-5, rel=1e-4)


def test_ten_points_of_the_digits():
    digit = digits()
    train, test = slice(0, 1000), slice(1000, 1400)
    data = {"x": digit.x[train], "y": digit.y[train]}
    result = kernel_points(data, iterations=60, batch=16, lr=0.05, snapshots=(0, 60))
    assert torch.equal(result.snapshots[60], result.x)
    assert result.x.shape == (10, 1, 8, 8)
    assert result.x.dtype == torch.float32
    codes = torch.eye(10, dtype=torch.float64)[result.y] - 0.1

    def accuracy(images):
        points, queries = images.flatten(1).double(), digit.x[test].flatten(1).double()
        kernels = relu_tangent_kernel(points, points), relu_tangent_kernel(queries, points)
        return (kernel_ridge(kernels[0], codes, kernels[1]).argmax(1) == digit.y[test]).double().mean()

    assert accuracy(result.snapshots[60]) > accuracy(result.snapshots[0]) + 0.08
    assert result.history[-10:].mean() < 0.7 * result.history[0]
    again = kernel_points(data, iterations=3, batch=16, lr=0.05)
    assert torch.equal(again.history, result.history[:3])
    chosen = kernel_points(data, iterations=1, batch=16, depth=2, ridge=0.5)
    assert chosen.history[0] != kernel_points(data, iterations=1, batch=16, depth=1, ridge=0.5).history[0]
    assert chosen.history[0] != kernel_points(data, iterations=1, batch=16, depth=2, ridge=0.1).history[0]


def test_bad_input():
    data = {"x": A, "y": torch.arange(6) % 2}
    for wrong in ({"batch": 0}, {"per_class": 0}, {"iterations": 0}, {"ridge": 0.0}, {"lr": -1.0}, {"depth": -1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            kernel_points(data, **wrong)
    with pytest.raises(ValueError, match="snapshots"):
        kernel_points(data, iterations=2, snapshots=(3,))
    with pytest.raises(ValueError, match="ridge"):
        kernel_ridge(linear(A, A), TARGETS, linear(B, A), 0.0)
    with pytest.raises(ValueError, match="points"):
        kernel_ridge(A[:0, :0], TARGETS[:0], A[:, :0])
    with pytest.raises(ValueError, match="x: expected at least one"):
        kernel_points_loss(A, TARGETS, A[:0], TARGETS[:0])
