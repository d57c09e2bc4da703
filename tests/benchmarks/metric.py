"""Rows of the benchmark for metric learning: forward and backward at batch 512 × 128, 64 classes of 8 unless said."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from toolkit import metric_learning as ml

Rows = dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], float]]
PEER = "pytorch-metric-learning"


def batch(labels: Tensor, dim: int = 128) -> tuple[Tensor, Tensor]:
    """Embeddings that lean towards the centre of their class."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(int(labels.max()) + 1, dim, generator=generator)
    return 0.5 * centres[labels] + torch.randn(len(labels), dim, generator=generator), labels


def backward(loss: Callable[..., Tensor], x: Tensor, y: Tensor) -> Callable[[], tuple[float, Tensor]]:
    def run() -> tuple[float, Tensor]:
        leaf = x.clone().requires_grad_()
        value = loss(leaf, y).mean()
        value.backward()
        assert leaf.grad is not None
        return value.item(), leaf.grad

    return run


def same(ours: Callable[[], tuple[float, Tensor]], peer: Callable[[], tuple[float, Tensor]]) -> None:
    """The comparison is fair only between equal values and gradients."""
    (a, g), (b, h) = ours(), peer()
    assert abs(a - b) <= 1e-5 * max(1.0, abs(b)), (a, b)
    assert float((g - h).abs().max()) <= 1e-5, float((g - h).abs().max())


def pair_losses() -> Rows:
    from pytorch_metric_learning import distances, losses, miners

    cos = distances.CosineSimilarity()
    raw = distances.SNRDistance(normalize_embeddings=False)
    hard, near = miners.BatchHardMiner(distance=cos), miners.MultiSimilarityMiner(0.1)
    margin, similar = losses.TripletMarginLoss(margin=0.2, distance=cos), losses.MultiSimilarityLoss(2, 50, 0.5)
    snr = losses.SignalToNoiseRatioContrastiveLoss(pos_margin=0.0, neg_margin=2.0, distance=raw)
    lifted = losses.GeneralizedLiftedStructureLoss(neg_margin=0, pos_margin=1, distance=cos)
    return {
        "triplet, all": (lambda x, y: ml.triplet(x, y, 0.2), margin, 8),
        "triplet, hard": (lambda x, y: ml.triplet(x, y, 0.2, "hard"), lambda x, y: margin(x, y, hard(x, y)), 1),
        "contrastive": (lambda x, y: ml.contrastive(x, y), losses.ContrastiveLoss(1.0, 0.5, distance=cos), 1),
        "contrastive, SNR": (lambda x, y: ml.contrastive(x, y, 0.0, 2.0, similarity=ml.snr), snr, 40),
        "multi-similarity": (lambda x, y: ml.multi_similarity(x, y, 2.0, 50.0, 0.5, None), similar, 1),
        "multi-similarity with miner": (
            lambda x, y: ml.multi_similarity(x, y, 2.0, 50.0, 0.5, 0.1),
            lambda x, y: similar(x, y, near(x, y)),
            2.5,
        ),
        "circle": (lambda x, y: ml.circle(x, y, 0.4, 80.0), losses.CircleLoss(0.4, 80), 1),
        "lifted structure": (lambda x, y: ml.lifted(x, y, 1.0), lifted, 1),
        "TCM": (lambda x, y: ml.tcm(x, y), losses.ThresholdConsistentMarginLoss(), 40),
        "SupCon": (lambda x, y: ml.sup_con(x, y, 0.1), losses.SupConLoss(0.1), 1),
    }


def slow_losses() -> dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], Tensor, float]]:
    """Cubic in the peer: a full batch of 512 takes it a minute and 15 GB, so labels are for half of one."""
    from pytorch_metric_learning import losses

    temperature = losses.NTXentLoss(0.07)
    return {
        "NT-Xent, 32 classes × 8": (
            lambda x, y: ml.nt_xent(x, y, 0.07),
            temperature,
            torch.arange(32).repeat_interleave(8),
            500,
        ),
        "NT-Xent, SimCLR form, 256 pairs": (
            lambda x, y: ml.nt_xent(x, y, 0.07),
            temperature,
            torch.arange(256).repeat(2),
            500,
        ),
    }


def proxy_losses() -> dict[str, tuple[Callable[..., Tensor], Any]]:
    from pytorch_metric_learning import losses

    return {
        "proxy-NCA": (ml.proxy_nca, losses.ProxyNCALoss(64, 128)),
        "proxy-anchor": (ml.proxy_anchor, losses.ProxyAnchorLoss(64, 128)),
        "normalised softmax": (
            lambda x, y, w: ml.normalised_softmax(x, y, w, 20.0),
            losses.NormalizedSoftmaxLoss(64, 128),
        ),
        "CosFace": (ml.cosface, losses.CosFaceLoss(64, 128)),
        "ArcFace": (lambda x, y, w: ml.arcface(x, y, w, torch.pi * 28.6 / 180), losses.ArcFaceLoss(64, 128)),
    }


def with_proxies(ours: Callable[..., Tensor], peer: Any, x: Tensor, y: Tensor) -> tuple[Callable[[], Any], ...]:
    """Ours and the peer's gradients in embeddings and proxies, with the same proxies in both."""
    proxies = (torch.randn(64, 128, generator=torch.Generator().manual_seed(1))).requires_grad_()
    name = "proxies" if hasattr(peer, "proxies") else "W"
    own = proxies.detach() if name == "proxies" else proxies.detach().T.contiguous()
    held = torch.nn.Parameter(own.clone())
    setattr(peer, name, held)
    leaf = x.clone().requires_grad_()

    def mine() -> Any:
        return torch.autograd.grad(ours(leaf, y, proxies).mean(), (leaf, proxies))

    def theirs() -> Any:
        return torch.autograd.grad(peer(leaf, y), (leaf, held))

    assert abs(ours(leaf, y, proxies).mean().item() - peer(leaf, y).item()) <= 1e-4
    return mine, theirs


def clouds(classes: int, items: int = 10_000) -> tuple[Tensor, Tensor]:
    return batch(torch.arange(items) % classes)


def peer_map_at_r() -> Callable[[Tensor, Tensor], float]:
    """The peer's fastest way: as many neighbours as the largest class, found by its own kNN 256 rows at a time."""
    from pytorch_metric_learning.distances import CosineSimilarity
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
    from pytorch_metric_learning.utils.inference import CustomKNN

    calculator = AccuracyCalculator(
        include=("mean_average_precision_at_r",),
        k="max_bin_count",
        device=torch.device("cpu"),
        knn_func=CustomKNN(CosineSimilarity(), batch_size=256),
        kmeans_func=lambda x, k: None,
    )
    return lambda x, y: calculator.get_accuracy(x, y)["mean_average_precision_at_r"]


def memory_of_map_at_r(classes: int) -> float:
    """MB by which one call raises the peak of resident memory, in a fresh process (Linux)."""
    code = (
        "import metric, torch; torch.set_num_threads(1);"
        "high = lambda: int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]);"
        f"x, y = metric.clouds({classes}); metric.ml.map_at_r(*metric.clouds(10, 300));"
        "before = high(); metric.ml.map_at_r(x, y); print((high() - before) / 1024)"
    )
    here = Path(__file__).parent
    path = {**os.environ, "PYTHONPATH": f"{here}{os.pathsep}{here.parent.parent}"}
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=path)
    return float(done.stdout)
