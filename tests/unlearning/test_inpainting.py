"""Image-to-image unlearning against the closed form of a linear encoder, moments of the noise, and exact zeros."""

from typing import Any

import pytest
import torch
from torch.func import vmap
from torch.nn import functional as F

from toolkit.fleet import SGD, Adam, AdamW, Fleet, train
from toolkit.random import key
from toolkit.unlearning.inpainting import (
    Inpainter,
    image_to_image,
    inpainting_errors,
    inpainting_loss,
    noise_images,
    noise_outputs,
)

N, SIDE, MEMBERS = 48, 4, 2


def net() -> Inpainter:
    return Inpainter(SIDE, 2, code=3, hidden=(8,)).double()


def line() -> Inpainter:
    return Inpainter(SIDE, 2, code=3, hidden=(), bias=False).double()


def draw() -> dict[str, torch.Tensor]:
    """Two classes: the bright rows are the upper ones or the lower ones."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(N) % 2
    rows = torch.arange(SIDE) < SIDE // 2
    bright = torch.where(y[:, None] == 1, rows, ~rows).double()[:, :, None].expand(-1, -1, SIDE)
    noise = torch.rand(N, SIDE, SIDE, dtype=torch.float64, generator=generator)
    return {"x": (0.7 * bright + 0.3 * noise)[:, None], "y": y}


DATA = draw()
X, Y = DATA["x"], DATA["y"]
FORGET = Y == 1


def make(build=net, steps: int = 60) -> Fleet:
    return train(
        build,
        inpainting_loss,
        DATA,
        members=MEMBERS,
        steps=steps,
        batch=16,
        optimiser=Adam(0.02),
        seed=1,
        progress=False,
    )


@pytest.fixture(scope="module")
def fleet() -> Fleet:
    return make()


def part(fleet: Fleet, name: str) -> torch.Tensor:
    views = fleet.layout.views(fleet.parameters)
    return torch.cat([views[n].flatten(1) for n in views if n.startswith(name)], 1)


def call(fleet: Fleet, **options: Any) -> Fleet:
    return image_to_image(fleet, DATA, FORGET, **options)


# ---------------------------------------------------------------------------------------------------------- the net


@pytest.mark.parametrize("outside", [False, True])
def test_only_the_visible_part_is_seen_and_only_the_hidden_part_is_judged(outside):
    model = Inpainter(4, 2, outside=outside, code=3, hidden=(5,)).double()
    centre = torch.zeros(4, 4, dtype=torch.bool)
    centre[1:3, 1:3] = True
    hidden = ~centre if outside else centre
    painted, codes = model(X, return_features=True)
    changed = torch.where(hidden, X + 5, X)
    assert torch.equal(model(changed), painted)
    assert not torch.equal(model(torch.where(hidden, X, X + 5)), painted)
    wanted = torch.stack([(p[0][hidden] - x[0][hidden]).square().mean() for p, x in zip(painted, X, strict=True)])
    torch.testing.assert_close(model(X, against=X), wanted)
    assert codes.shape == (N, 3)
    assert painted.shape == X.shape


def test_a_hole_must_leave_something_to_see_and_images_must_fit():
    with pytest.raises(ValueError, match="hole: expected 1 to 3"):
        Inpainter(4, 4)
    with pytest.raises(ValueError, match="code"):
        Inpainter(4, 2, code=0)
    with pytest.raises(ValueError, match="x: expected 16 pixels"):
        net()(X[:, :, :2])


# -------------------------------------------------------------------------------------------------------- the noise


def test_noise_has_the_mean_and_the_deviation_of_the_batch():
    like = 0.5 + 0.05 * torch.randn(200, 1, 10, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    made, count = noise_images(like, key(7)), like.numel()  # five deviations from a bound: nothing is clamped
    assert abs(made.mean() - like.mean()) < 3 * like.std() / count**0.5
    assert abs(made.std() - like.std()) < 3 * like.std() / (2 * count) ** 0.5


def test_noise_is_clamped_and_its_other_kinds_are_flat_or_uniform():
    like = (torch.arange(8000.0) % 2).reshape(80, 100)  # mean 1/2, deviation 1/2: a third of the noise is clamped
    made = noise_images(like, key(1))
    assert made.min() == 0
    assert made.max() == 1
    beyond = 0.15866  # the normal's share beyond one deviation
    assert abs((made == 0).double().mean() - beyond) < 4 * (beyond / 8000) ** 0.5
    torch.testing.assert_close(noise_images(like, key(1), "constant"), torch.full_like(like, 0.5))
    uniform = noise_images(like / 10, key(1), "uniform")
    assert abs(uniform.mean() - 0.5) < 4 * (12 * 8000) ** -0.5
    assert uniform.max() > 0.99


def test_noise_depends_on_the_key_only_and_vmaps():
    keys = torch.stack([key(1), key(2)])
    both = vmap(lambda k: noise_images(X, k))(keys)
    for row, one in zip(both, keys, strict=True):
        torch.testing.assert_close(row, noise_images(X, one))
    assert not torch.equal(both[0], both[1])


# ------------------------------------------------------------------------------------------------------- the method


def test_at_the_start_the_part_for_kept_images_is_exactly_zero(fleet):
    same = call(fleet, forget_weight=0.0, retain_weight=3.0, steps=5, optimiser=SGD(1.0))
    assert torch.equal(same.history, torch.zeros_like(same.history))
    assert torch.equal(same.parameters, fleet.parameters)
    adam = call(fleet, forget_weight=0.0, steps=20)  # which would make a large step of a slope of 1e-17
    assert torch.equal(adam.parameters, fleet.parameters)


def test_without_a_weight_only_decay_moves_the_encoder(fleet):
    decayed = call(fleet, forget_weight=0.0, retain_weight=0.0, steps=3, optimiser=AdamW(0.1, weight_decay=0.5))
    torch.testing.assert_close(part(decayed, "encoder"), part(fleet, "encoder") * 0.95**3)
    assert torch.equal(part(decayed, "decoder"), part(fleet, "decoder"))


@pytest.mark.parametrize("aim", ["noise_code", "random_code", "noise_image", "max_loss"])
def test_the_decoder_stays_to_the_last_bit(fleet, aim):
    out = call(fleet, aim=aim, steps=10, optimiser=AdamW(0.01, weight_decay=0.1))
    assert torch.equal(part(out, "decoder"), part(fleet, "decoder"))
    assert not torch.equal(part(out, "encoder"), part(fleet, "encoder"))


def seen(x: torch.Tensor) -> torch.Tensor:
    hidden = line().get_buffer("hidden_part")
    return x.flatten(1) * (1 - hidden)


def descend(first, minimum, joint, rate: float, steps: int):
    """Gradient descent on the mean over 3 code values of |E x|²: what is left of the way to the minimum shrinks so."""
    shrink = torch.eye(len(joint), dtype=torch.float64) - rate * 2 / 3 * joint
    return minimum + (first - minimum) @ torch.linalg.matrix_power(shrink, steps)


def closed_form(first, n, a_f: float, a_r: float):
    """E* = E₀ (a_R C_r + a_F M) (a_R C_r + a_F C_f)⁻¹, M = mean of n xᵀ, and the matrix that is inverted."""
    x_r, x_f = seen(X[~FORGET]), seen(X[FORGET])
    c_r, c_f, m = x_r.T @ x_r / len(x_r), x_f.T @ x_f / len(x_f), n.T @ x_f / len(x_f)
    joint = a_r * c_r + a_f * c_f
    inverse = torch.linalg.pinv(joint, rtol=1e-10)
    left = torch.eye(len(joint), dtype=torch.float64) - joint @ inverse  # what no image has stays as it was
    return first @ (a_r * c_r + a_f * m) @ inverse + first @ left, joint


@pytest.mark.parametrize(("a_f", "a_r"), [(0.3, 1.0), (1.5, 0.5)])
def test_a_linear_encoder_descends_to_its_closed_form(a_f, a_r):
    """With noise that is the same every time each step is known, and so is where they lead."""
    original = make(line, 10)
    first = original.layout.views(original.parameters)["encoder.0.weight"]
    wanted, joint = closed_form(first, seen(X.mean().expand_as(X[FORGET])), a_f, a_r)
    assert (wanted - first).abs().max() > 0.05
    options: dict[str, Any] = {"noise": "constant", "batch": N // 2, "optimiser": SGD(0.2)}
    for steps in (1, 40):
        out = call(original, forget_weight=a_f, retain_weight=a_r, steps=steps, **options)
        got = out.layout.views(out.parameters)["encoder.0.weight"]
        torch.testing.assert_close(got, descend(first, wanted, joint, 0.2, steps), atol=1e-10, rtol=0)


def test_gaussian_noise_descends_to_the_closed_form_of_its_mean():
    """New noise at every step: M is (mean noise) (mean x_f)ᵀ, up to the chance in the steps."""
    original = make(line, 10)
    first = original.layout.views(original.parameters)["encoder.0.weight"]
    draws = torch.cat([noise_images(X, key(9, i)) for i in range(200)])
    n = seen(draws).mean(0).expand(N // 2, -1)
    wanted, joint = closed_form(first, n, 1.0, 1.0)
    out = call(original, forget_weight=1.0, batch=N // 2, steps=80, optimiser=SGD(0.2))
    got, mean = out.layout.views(out.parameters)["encoder.0.weight"], descend(first, wanted, joint, 0.2, 80)
    assert (got - mean).norm() < 0.15 * (mean - first).norm()


@pytest.mark.parametrize(("aim", "sign"), [("noise_code", 1), ("noise_image", 1), ("max_loss", -1)])
def test_one_step_is_the_slope_of_the_formula(fleet, aim, sign):
    out = call(
        fleet,
        aim=aim,
        noise="constant",
        forget_weight=0.7,
        batch=N // 2,
        steps=1,
        optimiser=SGD(1.0),
    )
    for member in range(MEMBERS):
        model, first = fleet[member], fleet[member]
        blank = X.mean().expand_as(X[FORGET])
        hidden = model.get_buffer("hidden_part").bool()
        if aim == "noise_code":
            value = F.mse_loss(
                model(X[FORGET], return_features=True)[1], first(blank, return_features=True)[1].detach()
            )
        else:
            against = blank if aim == "noise_image" else X[FORGET]
            value = F.mse_loss(model(X[FORGET]).flatten(1)[:, hidden], against.flatten(1)[:, hidden])
        (0.7 * sign * value).backward()
        slopes = torch.cat([p.grad.flatten() for p in model.encoder.parameters()])
        moved = part(fleet, "encoder")[member] - part(out, "encoder")[member]
        torch.testing.assert_close(moved, slopes, atol=1e-10, rtol=1e-7)


def test_random_codes_take_the_place_of_the_code_of_noise(fleet):
    """The least of mean |E - ε|² is at E = 0: codes shrink towards it, however large those of noise are."""
    out = call(fleet, aim="random_code", forget_weight=1.0, retain_weight=0.0, steps=120, optimiser=Adam(2e-2))
    norm = [f.features(X[FORGET]).square().mean() for f in (fleet, out)]
    assert norm[1] < 0.15 * norm[0]
    first = call(fleet, aim="random_code", forget_weight=1.0, batch=N // 2, steps=1).history[:, 0]
    wanted = fleet.features(X[FORGET]).square().mean((1, 2)) + 1  # E|E - ε|² = |E|² + 1
    deviation = (4 * fleet.features(X[FORGET]).square().mean((1, 2)) + 2).sqrt() / (3 * N // 2) ** 0.5
    assert bool(((first - wanted).abs() < 4 * deviation).all())


def test_more_weight_means_more_error_on_what_is_forgotten_and_paintings_nearer_to_those_of_noise(fleet):
    ladder = torch.tensor([0.0, 0.01, 0.03, 0.1, 0.2], dtype=torch.float64)
    options: dict[str, Any] = {"steps": 60, "batch": 24, "optimiser": SGD(0.3)}
    outs = [call(fleet[[i] * 5], forget_weight=ladder, **options) for i in range(MEMBERS)]
    for i, out in enumerate(outs):
        errors = inpainting_errors(out, X[FORGET]).mean(1)
        assert bool((errors.diff() > 0).all())
        torch.testing.assert_close(errors[0], inpainting_errors(fleet, X[FORGET])[i].mean())
    aim = noise_outputs(fleet, X).mean(1, keepdim=True)
    for i, out in enumerate(outs):
        gaps = (out.logits(X[FORGET]) - aim[i]).square().flatten(1).mean(1)
        assert gaps[-1] < 0.5 * gaps[0]


def test_members_have_their_own_weights_and_sets(fleet):
    weights, masks = torch.tensor([0.2, 0.9], dtype=torch.float64), torch.stack([Y == 1, torch.arange(N) < 10])
    together = image_to_image(fleet, DATA, masks, forget_weight=weights, steps=8, batch=8)
    for i in range(MEMBERS):
        alone = image_to_image(fleet[i : i + 1], DATA, masks[i], forget_weight=float(weights[i]), steps=8, batch=8)
        torch.testing.assert_close(alone.parameters[0], together.parameters[i], atol=1e-9, rtol=0)


def test_a_proxy_set_takes_the_place_of_what_is_kept(fleet):
    """With rows that were not trained on as ``retain``, what stands in the true rows makes no difference."""
    proxy = {"x": torch.cat([X, 1 - X[:12]]), "y": torch.cat([Y, Y[:12]])}
    forget, retain = torch.arange(N + 12) < N, torch.arange(N + 12) >= N
    forget = forget & (proxy["y"] == 1)
    other = {"x": torch.where((forget | retain)[:, None, None, None], proxy["x"], 0.123), "y": proxy["y"]}
    first, second = (image_to_image(fleet, d, forget, retain=retain, steps=5) for d in (proxy, other))
    assert torch.equal(first.parameters, second.parameters)


def test_wrong_input_is_named(fleet):
    for wrong, words in ((torch.zeros_like(FORGET), "forget"), (torch.ones_like(FORGET), "forget")):
        with pytest.raises(ValueError, match=words):
            image_to_image(fleet, DATA, wrong)
    with pytest.raises(ValueError, match="forget_weight: expected at least 0"):
        call(fleet, forget_weight=-1.0)
    plain = train(
        lambda: torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 2)).double(),
        lambda model, batch, hyper: model(batch.x).square().mean(1),
        DATA,
        members=1,
        steps=1,
        progress=False,
    )
    with pytest.raises(ValueError, match="encoder and a decoder"):
        call(plain)
