"""Data of the experiments: scikit-learn's own sets, CIFAR-10 and LIBSVM files that the user has, sequences to sort."""

import pickle
from pathlib import Path

import numpy as np
import torch
from sklearn import datasets
from torch import Tensor, nn

CIFAR_BATCHES = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]


def standardised(values: Tensor) -> Tensor:
    """Mean 0 and standard deviation 1 for every channel or feature, which is dimension 1; a constant one becomes 0."""
    others = [dim for dim in range(values.ndim) if dim != 1]
    centred = values - values.mean(dim=others, keepdim=True)
    deviation = centred.square().mean(dim=others, keepdim=True).sqrt()
    return centred / torch.where(deviation > 0, deviation, 1.0)


def one_hot(labels: Tensor, classes: int) -> Tensor:
    """Labels as the targets of a squared loss, float32."""
    return nn.functional.one_hot(labels, classes).float()


def half_squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Half the squared distance, averaged over the examples."""
    return 0.5 * (outputs - targets).square().sum(dim=1).mean()


def images(data: str | None, *, examples: int, classes: int, side: int | None = None) -> tuple[Tensor, Tensor]:
    """Standardised images of the first ``classes`` classes, ``(n, channels, side, side)``, and their labels.

    Args:
        data: Folder with the batches of CIFAR-10's Python version; None takes scikit-learn's 8×8 digits.
        examples: How many: the first ones.
        classes: Labels below this are taken.
        side: Height and width to resize to; None leaves them.
    """
    pixels, labels = digits() if data is None else cifar10(Path(data))
    chosen = (labels < classes).nonzero().flatten()[:examples]
    if len(chosen) < examples:
        raise ValueError(f"examples is {examples}: there are {len(chosen)} images of the first {classes} classes")
    pixels = pixels[chosen]
    if side is not None and side != pixels.shape[-1]:
        pixels = nn.functional.interpolate(pixels, size=side, mode="bilinear", align_corners=False)
    return standardised(pixels), labels[chosen]


def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's digits, ``(1797, 1, 8, 8)``, and their labels."""
    data = datasets.load_digits()
    return torch.tensor(data.images, dtype=torch.float32).unsqueeze(1), torch.tensor(data.target)


def cifar10(folder: Path) -> tuple[Tensor, Tensor]:
    """All batches of CIFAR-10's Python version in a folder, ``(n, 3, 32, 32)``, and their labels.

    The batches are pickles: only arrays are let in, so that a file from elsewhere cannot run anything.
    """
    nested = folder / "cifar-10-batches-py"
    folder = nested if nested.is_dir() else folder
    files = [folder / name for name in CIFAR_BATCHES if (folder / name).is_file()]
    if not files:
        raise FileNotFoundError(
            f"data is {str(folder)!r}, and there is no data_batch_1 in it: expected the folder cifar-10-batches-py of "
            "CIFAR-10's Python version, from https://www.cs.toronto.edu/~kriz/cifar.html"
        )
    batches = []
    for file in files:
        with file.open("rb") as stream:
            batches.append(_ArraysOnly(stream, encoding="bytes").load())
    pixels = np.concatenate([np.asarray(batch[b"data"], dtype=np.uint8) for batch in batches])
    labels = np.concatenate([np.asarray(batch[b"labels"], dtype=np.int64) for batch in batches])
    return torch.from_numpy(pixels.reshape(-1, 3, 32, 32)).float() / 255, torch.from_numpy(labels)


class _ArraysOnly(pickle.Unpickler):
    """Unpickles NumPy arrays and plain containers, nothing else."""

    ALLOWED = frozenset({"_reconstruct", "ndarray", "dtype", "_frombuffer", "encode"})

    def find_class(self, module: str, name: str) -> object:
        """A constructor of arrays, or an error."""
        if name in self.ALLOWED and module.partition(".")[0] in ("numpy", "_codecs"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"a CIFAR-10 batch holds arrays, this file also holds {module}.{name}")


def two_classes(data: str | None) -> tuple[Tensor, Tensor]:
    """Standardised features ``(n, d)`` and labels −1 or 1 of a set with two classes.

    Args:
        data: LIBSVM file such as a5a or w5a, or a folder that holds one; None takes scikit-learn's breast-cancer set.
    """
    if data is None:
        cancer = datasets.load_breast_cancer()
        features, labels = cancer.data, cancer.target
    else:
        sparse, labels = datasets.load_svmlight_file(str(libsvm_file(Path(data))))
        features = sparse.toarray()
    if len(np.unique(labels)) != 2:
        raise ValueError(f"data is {data!r}: expected two different labels, it has {len(np.unique(labels))}")
    signs = torch.tensor(np.where(labels == labels.max(), 1.0, -1.0), dtype=torch.float32)
    return standardised(torch.tensor(features, dtype=torch.float32)), signs


def libsvm_file(path: Path) -> Path:
    """The file itself, or the only one in a folder that is called a5a, w5a or something like it."""
    if path.is_file():
        return path
    found = [path / name for name in ("a5a", "w5a", "a5a.txt", "w5a.txt") if (path / name).is_file()]
    if len(found) == 1:
        return found[0]
    raise FileNotFoundError(
        f"data is {str(path)!r}: expected a file in LIBSVM format, or a folder with one of a5a and w5a, from "
        f"https://www.csie.ntu.edu.tw/~cjlin/libsvmtools/datasets/binary.html; found {len(found)}"
    )


def sorting(*, examples: int, length: int, digits: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Digits and then all but the last of them in order, ``(n, 2·length − 1)``, and all in order, ``(n, length)``."""
    numbers = torch.randint(digits, (examples, length), generator=torch.Generator().manual_seed(seed))
    ordered = numbers.sort(dim=1).values
    return torch.cat([numbers, ordered[:, :-1]], dim=1), ordered
