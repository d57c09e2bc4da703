"""Every public function is used by a lab notebook; those that wait for a lab to come are listed, with that lab."""

from importlib import import_module
from inspect import isclass, isfunction

import pytest

from toolkit.labs.papers import names_used
from toolkit.labs.reading import code, find, read

ROOMS = (
    "calibration",
    "data",
    "diffusion",
    "distillation",
    "evidence",
    "explore",
    "figures",
    "fleet",
    "metric_learning",
    "models",
    "scaling_laws",
    "unlearning",
)

WAITING = {
    "toolkit.data.cifar10": "profile large of the distillation lab",
    "toolkit.data.cifar100": "profile large of the distillation lab",
    "toolkit.data.fashion_mnist": "profile large of the unlearning lab",
    "toolkit.data.mnist": "profile large of the scaling-laws lab",
    "toolkit.data.cache_dir": "for users who look for their downloads",
    "toolkit.diffusion.alpha_sigma": "every conversion is built on it",
    "toolkit.diffusion.denoised_to_epsilon": "for models that answer with the denoised point",
    "toolkit.diffusion.epsilon_field": "samplers and erasure are built on it",
    "toolkit.diffusion.epsilon_to_denoised": "samplers are built on it",
    "toolkit.diffusion.epsilon_to_score": "for models of scores",
    "toolkit.diffusion.guided": "the samplers are built on it",
    "toolkit.diffusion.mmd": "measures of samples are built on it",
    "toolkit.diffusion.noised": "the denoising loss is built on it",
    "toolkit.diffusion.probability_flow": "samplers of the distillation lab are built on it",
    "toolkit.diffusion.score_to_epsilon": "exact fields are built on it",
    "toolkit.diffusion.sliced_wasserstein": "measures of erasure are built on it",
}


def public() -> list[str]:
    found = []
    for room in ROOMS:
        module = import_module(f"toolkit.{room}")
        found += [f"toolkit.{room}.{name}" for name in module.__all__ if isfunction(getattr(module, name))]
    return found


@pytest.fixture(scope="module")
def used() -> set[str]:
    return set().union(*(names_used(cell.source) for path in find() for cell in code(read(path))))


def test_every_public_function_is_used_by_a_lab_or_waits_for_one(used) -> None:
    idle = {name for name in public() if name.rpartition(".")[2] not in used}
    assert idle == set(WAITING), "use the new ones in a lab; strike the used ones from the list"


def test_public_functions_are_documented() -> None:
    names = [*public()]
    for room in ROOMS:
        module = import_module(f"toolkit.{room}")
        names += [f"toolkit.{room}.{name}" for name in module.__all__ if isclass(getattr(module, name))]
    bare = []
    for name in names:
        room, _, last = name.rpartition(".")
        if not (getattr(import_module(room), last).__doc__ or "").strip():
            bare.append(name)
    assert bare == []
