"""Record a sweep of byte-level language models over widths × data × seeds, with the loss at several steps.

    python -m toolkit.scaling_laws.record data/sweeps/byte_models.csv --device cpu
    python -m toolkit.scaling_laws.record sweep.csv --size large --text corpus.txt --device cuda

``small`` takes seconds on one core. ``large`` is meant for a GPU: thousands of runs.
"""

import argparse
import bisect
import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from toolkit.fleet import AdamW, grid, train, warmup
from toolkit.fleet.devices import pick_device
from toolkit.models import MLP, ByteTransformer
from toolkit.random import fold_in, key, permutation, uniform
from toolkit.scaling_laws.sweeps import Sweep, run_sweep, save_sweep

__all__ = ["byte_models", "markov_text"]

SIZES: dict[str, dict[str, Any]] = {
    "small": {
        "widths": [4, 8, 16, 32],
        "windows": [512, 2048, 8192],
        "seeds": 4,
        "steps": [200, 800],
        "text": 50_000,
    },
    "large": {
        "widths": [8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256],
        "windows": [2**i for i in range(8, 17)],
        "seeds": 16,
        "steps": [250, 500, 1000, 2000, 4000, 8000],
        "text": 400_000,
    },
}
UNITS = {
    "model": "",
    "width": "hidden units",
    "parameters": "parameters",
    "windows": "training windows",
    "bytes": "predicted training bytes, distinct",
    "seed": "",
    "step": "optimiser steps",
    "train_loss": "nats/byte",
    "test_loss": "nats/byte",
}


def markov_text(length: int, symbols: int = 8, seed: int = 0) -> Tensor:
    """``(length,)`` uint8 drawn from a random Markov chain of order 2: text whose best possible loss is computable.

    After bytes a, b the next is c with probability proportional to u⁸, u uniform and fixed by (seed, a, b, c).
    Raises ``ValueError`` for fewer than 3 bytes or symbols outside 2 .. 256.
    """
    if length < 3 or not 2 <= symbols <= 256:
        raise ValueError(f"length, symbols: expected at least 3 and 2 to 256, got {length} and {symbols}")
    table = uniform(key(seed, 0), (symbols, symbols, symbols), torch.float64).pow(8)
    cumulative = (table / table.sum(-1, keepdim=True)).cumsum(-1).tolist()
    draws = uniform(key(seed, 1), (length,), torch.float64).tolist()
    text = [0, 0]
    for draw in draws:
        text.append(min(bisect.bisect(cumulative[text[-2]][text[-1]], draw), symbols - 1))
    return torch.tensor(text[2:], dtype=torch.uint8)


def byte_models(
    text: Tensor,
    width: int,
    *,
    model: str = "mlp",
    windows: Sequence[int] = (64, 256, 1024),
    seeds: int = 3,
    steps: Sequence[int] = (400,),
    context: int = 4,
    batch: int = 64,
    lr: float = 3e-3,
    tested: int = 2000,
    seed: int = 0,
    device: str | torch.device = "auto",
) -> dict[str, Any]:
    """Train ``len(windows) × seeds`` language models of one width as one fleet; columns of a sweep (see ``UNITS``).

    Bytes are renamed to their rank among those that occur, which leaves the loss per byte as it is. The last fifth of
    the text is for the test. Each seed draws its own windows, and its smaller sets lie inside its larger ones; members
    of a seed share initial weights.

    Args:
        text: ``(length,)`` uint8.
        width: hidden units of the net, or width of the transformer (even).
        model: ``mlp`` predicts a byte from the ``context`` before it; ``transformer`` (one block) each byte of a window
            from those before it, at most ``context``.
        windows: numbers of distinct training windows.
        steps: optimiser steps at which the losses are measured; training lasts for the largest of them.
        batch, lr: of AdamW, with a warm-up of 2 % and a constant rate, so that every step is an end in itself.
        tested: windows of the test text, evenly spaced, that the test loss is the mean over.

    ``train_loss`` is the mean over the last 20 batches before the step. Raises ``ValueError`` for an argument out of
    range or a text with too few windows.
    """
    if text.ndim != 1 or text.dtype != torch.uint8:
        raise ValueError(f"text: expected bytes (length,) of torch.uint8, got {tuple(text.shape)} of {text.dtype}")
    if model not in ("mlp", "transformer"):
        raise ValueError(f"model: expected 'mlp' or 'transformer', got {model!r}")
    if not windows or not steps or min(*windows, *steps, context, tested) < 1:
        raise ValueError("windows, steps, context, tested: expected whole numbers of at least 1")
    alphabet, ranks = text.unique(return_inverse=True)
    symbols, split = len(alphabet), len(text) * 4 // 5
    stride = 1 if model == "mlp" else context
    pools = [part.unfold(0, context + 1, stride) for part in (ranks[:split], ranks[split:]) if len(part) > context]
    if len(pools) < 2 or len(pools[0]) < max(windows):
        have = len(pools[0]) if pools else 0
        raise ValueError(f"text: expected at least {max(windows)} training windows, got {have} from {len(text)} bytes")
    pool, test = pools
    test = test[torch.linspace(0, len(test) - 1, min(tested, len(test))).long()]

    def build() -> torch.nn.Module:
        if model == "mlp":
            return MLP(context * symbols, (width,), symbols)
        return ByteTransformer(context, symbols, width, depth=1, heads=2)

    def loss(net, batch, hyper):
        if model == "mlp":
            hot = F.one_hot(batch.x[:, :-1], symbols).to(torch.float32)
            return F.cross_entropy(net(hot), batch.x[:, -1], reduction="none")
        logits = net(batch.x[:, :-1])
        return F.cross_entropy(logits.mT, batch.x[:, 1:], reduction="none").mean(1)

    place = pick_device(device)
    members = grid(seeds, windows=list(windows))
    orders = permutation(fold_in(key(seed, 1), torch.arange(seeds)), len(pool))  # (seeds, pool)
    chosen = torch.zeros(len(windows), seeds, len(pool), dtype=torch.bool)
    for i, count in enumerate(windows):
        chosen[i].scatter_(1, orders[:, :count], True)
    measured = sorted(set(steps))
    fleet = train(
        build,
        loss,
        {"x": pool.contiguous()},
        steps=measured[-1],
        batch=batch,
        optimiser=AdamW(lr=lr),
        schedule=warmup(0.02),
        subsets=chosen.flatten(0, 1),
        seed=seed,
        snapshots=measured,
        device=place,
        progress=False,
        **members,
    )
    columns: dict[str, list[Any]] = {name: [] for name in UNITS}
    for step in measured:
        tests = fleet.at(step).evaluate(lambda net, batch, hyper: loss(net, batch, hyper).mean(), {"x": test})
        trains = fleet.history[:, max(0, step - 20) : step].mean(1)
        for i, (tried, trained) in enumerate(zip(tests.tolist(), trains.tolist(), strict=True)):
            count = windows[i // seeds]
            row = (model, width, fleet.layout.size, count, count * (1 if model == "mlp" else context), i % seeds, step)
            for name, value in zip(UNITS, (*row, trained, tried), strict=True):
                columns[name].append(value)
    return columns


def record(path: str, text: Tensor, source: str, widths: Sequence[int], jobs: int = 1, **settings: Any) -> Sweep:
    """Run :func:`byte_models` for all ``widths`` and save the sweep at ``path``."""
    columns = run_sweep(byte_models, [{"text": text, "width": width, **settings} for width in widths], jobs=jobs)
    place = pick_device(settings.get("device", "auto"))
    return save_sweep(
        path,
        columns,
        UNITS,
        script="toolkit.scaling_laws.record",
        seed=settings.get("seed", 0),
        device=torch.cuda.get_device_name(place) if place.type == "cuda" else str(place),
        settings={"text": source, "widths": list(widths)} | {k: v for k, v in settings.items() if k != "device"},
        about="Byte-level language models of one hidden layer or block: loss by width, training data, seed and step.",
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line: see the module's first lines."""
    parser = argparse.ArgumentParser(
        prog="python -m toolkit.scaling_laws.record", description="Record a sweep of byte-level language models."
    )
    parser.add_argument("path", help="table to write, .csv or .safetensors; its card goes beside it")
    parser.add_argument("--size", choices=list(SIZES), default="small")
    parser.add_argument("--model", choices=["mlp", "transformer"], default="mlp")
    parser.add_argument("--text", help="any file, read as bytes; without it a random Markov chain's text")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    given = parser.parse_args(arguments)
    chosen = SIZES[given.size]
    if given.text:
        with open(given.text, "rb") as file:
            text = torch.frombuffer(bytearray(file.read()), dtype=torch.uint8)
        source = f"{os.path.basename(given.text)}, {len(text)} bytes"
    else:
        text = markov_text(chosen["text"], seed=given.seed)
        source = f"markov_text({chosen['text']}, seed={given.seed})"
    settings = {name: chosen[name] for name in ("windows", "seeds", "steps")}
    settings |= {"model": given.model, "seed": given.seed, "device": given.device}
    sweep = record(given.path, text, source, chosen["widths"], jobs=given.jobs, **settings)
    print(f"{len(sweep)} rows in {given.path}")


if __name__ == "__main__":
    main()
