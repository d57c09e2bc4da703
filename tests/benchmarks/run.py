"""How fast: ours against the usual way, one thread, ratios taken in one process, medians of interleaved repeats.

``make bench`` installs the heavy peers into an environment of their own and prints this table. Peers that are not
installed are left out, by name. Seconds are CPU seconds of this machine; only the ratios travel.
"""

import argparse
import importlib
import math
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

os.environ.update({"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"})
sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))

import numpy as np
import torch
import torch.nn.functional as F

from toolkit import calibration, data, fleet, metric_learning, models

Run = Callable[[], object]


@dataclass
class Row:
    """One line of the table: a task, ours, a peer, and the ratio asked for."""

    task: str
    peer: str
    ours_ms: float
    peer_ms: float
    goal: float

    @property
    def ratio(self) -> float:
        return self.peer_ms / self.ours_ms


def clock(run: Run, device: str = "cpu") -> float:
    """CPU milliseconds of one call (wall-clock milliseconds, synchronised, on a GPU)."""
    if device == "cpu":
        start = time.process_time()
        run()
        return 1e3 * (time.process_time() - start)
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def repeat(run: Run, count: int) -> None:
    for _ in range(count):
        run()


def compare(task: str, ours: Run, peers: dict[str, tuple[Run, float]], repeats: int = 5) -> list[Row]:
    """Interleaved repeats after one warm-up of each; medians. A repeat is as many calls in a row as take 25 ms."""
    runs = {"ours": ours} | {name: run for name, (run, _) in peers.items()}
    calls: dict[str, int] = {}
    for name, run in runs.items():
        run()
        calls[name] = max(1, math.ceil(25 / max(clock(run), 0.025)))
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            times[name].append(clock(partial(repeat, run, calls[name])) / calls[name])
    middle = {name: statistics.median(values) for name, values in times.items()}
    return [Row(task, name, middle["ours"], middle[name], goal) for name, (_, goal) in peers.items()]


def available(*names: str) -> bool:
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            print(f"left out: {name} ({error})", file=sys.stderr)
            return False
    return True


def half_data_setting(members: int, steps: int):
    """The setting of the fleet rows: digits, MLP 64-64-10, each member on its own random half, batch 64."""
    digits = data.digits()
    x, y = digits.x.flatten(1), digits.y
    halves = torch.rand(members, len(x), generator=torch.Generator().manual_seed(0)) < 0.5

    def build() -> models.MLP:
        return models.MLP(64, (64,), 10)

    def loss(model, batch, hyper):
        return calibration.losses.cross_entropy(model(batch.x), batch.y)

    def train(fast: bool = True, device: str = "cpu") -> fleet.Fleet:
        return fleet.train(
            build,
            loss,
            {"x": x, "y": y},
            subsets=halves,
            steps=steps,
            batch=64,
            optimiser=fleet.Adam(2e-3),
            fast=fast,
            device=device,
            progress=False,
        )

    def one_by_one(fused: bool, count: int, device: str = "cpu") -> None:
        at, labels = x.to(device), y.to(device)
        for i in range(count):
            torch.manual_seed(i)
            model = build().to(device)
            optimiser = torch.optim.Adam(model.parameters(), lr=2e-3, fused=fused)
            own = halves[i].nonzero()[:, 0].to(device)
            order = own[torch.randperm(len(own), device=device)]
            place = 0
            for _ in range(steps):
                if place + 64 > len(order):
                    order, place = own[torch.randperm(len(own), device=device)], 0
                index = order[place : place + 64]
                place += 64
                value = F.cross_entropy(model(at[index]), labels[index])
                optimiser.zero_grad()
                value.backward()
                optimiser.step()

    return train, one_by_one


def fleet_rows() -> list[Row]:
    train, one_by_one = half_data_setting(64, 660)
    rows = []
    fast, general, plain, fused = [], [], [], []
    train(), one_by_one(False, 1), one_by_one(True, 1)
    for _ in range(3):
        fast.append(clock(train))
        plain.append(8 * clock(lambda: one_by_one(False, 8)))
        general.append(clock(lambda: train(fast=False)))
        fused.append(8 * clock(lambda: one_by_one(True, 8)))
    ours, vmap = statistics.median(fast), statistics.median(general)
    for task, mine, goals in (("fleet of 64", ours, (10, 7)), ("fleet of 64, general path", vmap, (5, 0))):
        for peer, times, goal in zip(("sequential", "sequential, fused Adam"), (plain, fused), goals, strict=True):
            rows.append(Row(task, peer, mine, statistics.median(times), goal))
    return rows


def ece_rows() -> list[Row]:
    generator = torch.Generator().manual_seed(0)
    probabilities = (2 * torch.randn(1_000_000, 10, generator=generator)).softmax(-1)
    labels = torch.randint(0, 10, (1_000_000,), generator=generator)
    peers: dict[str, tuple[Run, float]] = {}
    if available("torchmetrics"):
        from torchmetrics.functional.classification import multiclass_calibration_error

        peers["torchmetrics"] = (lambda: multiclass_calibration_error(probabilities, labels, 10, n_bins=15), 3)
    if available("netcal.metrics"):
        from netcal.metrics import ECE

        given, truth = probabilities.numpy(), labels.numpy()
        peers["netcal"] = (lambda: ECE(15).measure(given, truth), 8)
    return compare("ECE, 1e6 × 10", lambda: calibration.ece(probabilities, labels), peers)


def temperature_rows() -> list[Row]:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(10_000, 100, generator=generator)
    labels = torch.multinomial(z.softmax(-1), 1, generator=generator)[:, 0]
    logits = 1.7 * z

    def loss(temperature: float) -> float:
        return F.cross_entropy(logits.double() / temperature, labels).item()

    best = float(calibration.fit_temperature(logits, labels))
    print(f"temperature: ours T = {best:.5f}, NLL {loss(best):.7f}", file=sys.stderr)
    peers: dict[str, tuple[Run, float]] = {}
    if available("netcal.scaling"):
        from netcal.scaling import TemperatureScaling

        given, truth = logits.double().softmax(-1).numpy(), labels.numpy()
        peers["netcal (float64)"] = (lambda: TemperatureScaling().fit(given, truth), 3)

    def lbfgs() -> None:
        """The recipe of torch-uncertainty, which needs torchvision: T from 1.5, rate 0.1, 100 iterations."""
        temperature = torch.full((1,), 1.5, requires_grad=True)
        optimiser = torch.optim.LBFGS([temperature], lr=0.1, max_iter=100)

        def closure() -> torch.Tensor:
            optimiser.zero_grad()
            value = F.cross_entropy(logits / temperature, labels)
            value.backward()
            return value

        optimiser.step(closure)

    peers["L-BFGS as in torch-uncertainty"] = (lbfgs, 10)
    return compare("temperature, 1e4 × 100", lambda: calibration.fit_temperature(logits, labels), peers)


def smooth_rows() -> list[Row]:
    rng = np.random.default_rng(0)
    confidence = rng.random(1_000_000)
    outcome = (rng.random(1_000_000) < confidence**1.5).astype(np.int64)
    p, y = torch.from_numpy(confidence), torch.from_numpy(outcome)
    peers: dict[str, tuple[Run, float]] = {}
    if available("relplot"):
        import relplot

        peers["relplot"] = (lambda: relplot.smECE(confidence, outcome), 10)
    return compare("smooth ECE, 1e6", lambda: calibration.smooth_ece(p, y), peers, repeats=3)


def mmce_rows() -> list[Row]:
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.randn(10_000, 10, generator=generator).softmax(-1)
    labels = torch.randint(0, 10, (10_000,), generator=generator)
    peers: dict[str, tuple[Run, float]] = {}
    if available("netcal.metrics"):
        from netcal.metrics import MMCE

        given, truth = probabilities.numpy(), labels.numpy()
        peers["netcal"] = (lambda: MMCE().measure(given, truth), 500)
    return compare("MMCE, 1e4", lambda: calibration.mmce(probabilities, labels), peers, repeats=3)


def metric_rows() -> list[Row]:
    """Losses of metric learning, forward and backward, and MAP@R, against pytorch-metric-learning."""
    if not available("pytorch_metric_learning"):
        return []
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    import metric

    rows = []
    x, y = metric.batch(torch.arange(64).repeat_interleave(8))
    for name, (loss, other, goal) in metric.pair_losses().items():
        ours, peer = metric.backward(loss, x, y), metric.backward(other, x, y)
        metric.same(ours, peer)
        rows += compare(f"{name}, 512 × 128", ours, {metric.PEER: (peer, goal)}, 9)
    for name, (loss, other) in metric.proxy_losses().items():
        mine, theirs = metric.with_proxies(loss, other, x, y)
        rows += compare(f"{name}, 512 × 128", mine, {metric.PEER: (theirs, 1)}, 51)
    for name, (loss, other, labels, goal) in metric.slow_losses().items():
        ours, peer = (metric.backward(each, *metric.batch(labels)) for each in (loss, other))
        metric.same(ours, peer)
        quick = statistics.median(clock(ours) for _ in range(15))
        rows.append(Row(name, metric.PEER, quick, clock(peer), goal))
    find = metric.peer_map_at_r()
    for classes in (100, 1000):
        x, y = metric.clouds(classes)
        task = f"MAP@R, 1e4 × 128, {classes} classes ({metric.memory_of_map_at_r(classes):.0f} MB)"
        rows += compare(task, partial(metric_learning.map_at_r, x, y), {metric.PEER: (partial(find, x, y), 1)}, 3)
    return rows


def import_rows() -> list[Row]:
    """Seconds of `import torch` alone and with the toolkit's ground floor and calibration room, in fresh processes."""
    plain = "import torch"
    code = "import torch, toolkit, toolkit.fleet, toolkit.models, toolkit.calibration"
    times: dict[str, list[float]] = {plain: [], code: []}
    for _ in range(5):
        for text, spent in times.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", text], check=True, cwd=os.path.join(sys.path[0]))
            spent.append(time.perf_counter() - start)
    alone, both = (statistics.median(values) for values in times.values())
    print(f"importing the ground floor and calibration adds {both - alone:.2f} s to import torch ({alone:.2f} s)")
    return []


def slider_rows() -> list[Row]:
    """Milliseconds from key press to redrawn figure in Chromium."""
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    try:
        from slider import key_to_figure

        print(f"slider: {key_to_figure():.0f} ms from key press to redrawn figure, median of 20 (goal: at most 100)")
    except (ImportError, FileNotFoundError) as error:
        print(f"left out: slider ({error})", file=sys.stderr)
    return []


def gpu_rows() -> list[Row]:
    if not torch.cuda.is_available():
        print("no CUDA GPU here: the GPU rows are left out")
        return []
    train, one_by_one = half_data_setting(1024, 660)
    train(device="cuda"), one_by_one(False, 1, "cuda")
    ours = statistics.median(clock(lambda: train(device="cuda"), "cuda") for _ in range(3))
    peer = 512 * statistics.median(clock(lambda: one_by_one(False, 2, "cuda"), "cuda") for _ in range(3))
    flops = 6 * 64 * (64 * 64 + 64 * 10) * 660 * 1024
    print(f"{torch.cuda.get_device_name()}: {flops / ours / 1e9:.2f} TFLOP/s reached by the fleet of 1,024")
    return [Row("fleet of 1,024 on the GPU", "sequential, same GPU", ours, peer, 300)]


def forget_rows() -> list[Row]:
    """Oracles, datamodels and an attack against as many trainings one after the other as the goal speaks of."""
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    import forget

    digits = forget.Digits()
    rows = {"kept": (~digits.forget).nonzero()[:, 0], "half": torch.arange(0, len(digits.forget), 2)}
    digits.oracles(2)
    digits.one_by_one(rows["half"], 1)
    table = []
    for name, ours, seen, count, goal in forget.tasks():
        before, mine, after = (
            clock(run)
            for run in (
                lambda seen=seen: digits.one_by_one(rows[seen], 4),
                lambda ours=ours: ours(digits),
                lambda seen=seen: digits.one_by_one(rows[seen], 4),
            )
        )
        table.append(Row(name, f"{count} sequential trainings", mine, count * (before + after) / 8, goal))
    return table


def fit_rows() -> list[Row]:
    """Fits of scaling laws, against a part of what the peers do, scaled to the whole."""
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    import fits

    table = []
    for row in fits.rows():
        row.ours()
        mine = statistics.median(clock(row.ours) for _ in range(5))
        table.append(Row(row.task, row.peer_name, mine, row.times * clock(row.peer), row.goal))
    return table


def distil_rows() -> list[Row]:
    """64 students of one teacher, against a part of the students one after the other, scaled to the whole."""
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    import distil

    digits = distil.Digits()
    mine, theirs = digits.check()
    print(f"distil: accuracy of the students ours {mine:.4f}, one by one {theirs:.4f}", file=sys.stderr)
    peers = distil.rows(digits)
    ours: list[float] = []
    times: dict[str, list[float]] = {row.peer_name: [] for row in peers}
    for _ in range(3):
        ours.append(clock(digits.ours))
        for row in peers:
            times[row.peer_name].append(row.times * clock(row.peer))
    middle = statistics.median(ours)
    task = "64 students of one teacher"
    return [Row(task, row.peer_name, middle, statistics.median(times[row.peer_name]), row.goal) for row in peers]


TASKS = {
    "fleet": fleet_rows,
    "ece": ece_rows,
    "temperature": temperature_rows,
    "smooth": smooth_rows,
    "mmce": mmce_rows,
    "metric": metric_rows,
    "forget": forget_rows,
    "fits": fit_rows,
    "distil": distil_rows,
    "import": import_rows,
    "slider": slider_rows,
    "gpu": gpu_rows,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tasks", nargs="*", help=f"some of {', '.join(TASKS)} (default: all)")
    chosen = parser.parse_args().tasks or list(TASKS)
    if unknown := set(chosen) - set(TASKS):
        parser.error(f"tasks: expected some of {', '.join(TASKS)}, got {', '.join(sorted(unknown))}")
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    rows = [row for name in chosen for row in TASKS[name]()]
    print(f"\n{platform.processor() or platform.machine()}, torch {torch.__version__}, one thread\n")
    print("| task | ours, ms | peer | peer, ms | ratio | goal |\n|---|---|---|---|---|---|")
    for row in rows:
        goal = f"≥ {row.goal:g}" if row.goal else "-"
        print(f"| {row.task} | {row.ours_ms:.1f} | {row.peer} | {row.peer_ms:.1f} | {row.ratio:.1f} | {goal} |")


if __name__ == "__main__":
    main()
