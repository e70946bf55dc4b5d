"""``examples/experiments/sources.py`` reads the files that it names, and says what is wrong with others."""

import importlib.util
import pickle
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from sklearn.datasets import dump_svmlight_file

FILE = Path(__file__).parents[2] / "examples" / "experiments" / "sources.py"


@pytest.fixture(scope="module")
def data() -> ModuleType:
    spec = importlib.util.spec_from_file_location("zoscope_example_sources", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cifar_folder(folder: Path, *, images: int = 12, nested: bool = False) -> tuple[Path, np.ndarray, list[int]]:
    """Two batches as they come from the site: a pickle of protocol 2 with bytes as keys, rows of 3072 bytes."""
    rng = np.random.default_rng(0)
    inner = folder / "cifar-10-batches-py" if nested else folder
    inner.mkdir(parents=True, exist_ok=True)
    pixels = rng.integers(0, 256, (2 * images, 3072), dtype=np.uint8)
    labels = rng.integers(0, 10, 2 * images).tolist()
    for number, part in enumerate((slice(0, images), slice(images, None)), start=1):
        batch = {b"batch_label": b"part", b"labels": labels[part], b"data": pixels[part], b"filenames": [b"a.png"]}
        (inner / f"data_batch_{number}").write_bytes(pickle.dumps(batch, protocol=2))
    return folder, pixels, labels


@pytest.mark.parametrize("nested", [False, True])
def test_cifar_batches_are_read_in_order_and_scaled(data: ModuleType, tmp_path: Path, nested: bool) -> None:
    folder, pixels, labels = cifar_folder(tmp_path, nested=nested)
    images, found = data.cifar10(folder)
    assert images.shape == (24, 3, 32, 32)
    assert found.tolist() == labels
    assert torch.equal(images[5, 1, 2], torch.from_numpy(pixels[5, 1024 + 64 : 1024 + 96]).float() / 255)


def test_images_are_the_first_of_the_first_classes_and_standardised(data: ModuleType, tmp_path: Path) -> None:
    folder, _, labels = cifar_folder(tmp_path, images=50)
    images, found = data.images(str(folder), examples=20, classes=4)
    assert found.tolist() == [label for label in labels if label < 4][:20]
    assert images.mean(dim=(0, 2, 3)).abs().max() < 1e-5
    assert torch.allclose(images.square().mean(dim=(0, 2, 3)), torch.ones(3), atol=1e-4)


def test_digits_are_the_default_and_can_be_resized(data: ModuleType) -> None:
    images, labels = data.images(None, examples=10, classes=4, side=16)
    assert images.shape == (10, 1, 16, 16)
    assert set(labels.tolist()) <= {0, 1, 2, 3}


def test_a_folder_without_cifar_is_refused_by_name(data: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="cifar-10-batches-py"):
        data.images(str(tmp_path), examples=10, classes=4)


def test_a_batch_that_would_run_code_is_refused(data: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "data_batch_1").write_bytes(pickle.dumps({b"data": Path.cwd, b"labels": []}, protocol=2))
    with pytest.raises(pickle.UnpicklingError, match="holds arrays"):
        data.cifar10(tmp_path)


def test_more_images_than_there_are_is_an_error_with_the_number(data: ModuleType, tmp_path: Path) -> None:
    folder, _, labels = cifar_folder(tmp_path)
    few = sum(label < 2 for label in labels)
    with pytest.raises(ValueError, match=rf"there are {few} images of the first 2 classes"):
        data.images(str(folder), examples=1000, classes=2)


@pytest.mark.parametrize("as_folder", [False, True])
def test_a_libsvm_file_is_read_with_its_labels_as_signs(data: ModuleType, tmp_path: Path, as_folder: bool) -> None:
    rng = np.random.default_rng(1)
    features = np.round(rng.standard_normal((30, 5)), 3) * (rng.random((30, 5)) < 0.5)
    features[0] = 1.0  # so that every feature varies and the last one is there
    labels = np.where(rng.random(30) < 0.4, 1, -1)
    dump_svmlight_file(features, labels, str(tmp_path / "a5a"), zero_based=False)
    read, signs = data.two_classes(str(tmp_path if as_folder else tmp_path / "a5a"))
    assert signs.tolist() == labels.tolist()
    expected = (features - features.mean(axis=0)) / features.std(axis=0)
    assert np.allclose(read, expected, atol=1e-4)


def test_a_missing_libsvm_file_is_named(data: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="LIBSVM"):
        data.two_classes(str(tmp_path / "w5a"))


def test_a_set_with_three_labels_is_refused(data: ModuleType, tmp_path: Path) -> None:
    dump_svmlight_file(np.eye(3), np.array([0, 1, 2]), str(tmp_path / "three"))
    with pytest.raises(ValueError, match="it has 3"):
        data.two_classes(str(tmp_path / "three"))


def test_a_feature_that_never_changes_becomes_zero(data: ModuleType) -> None:
    values = torch.tensor([[1.0, 5.0], [3.0, 5.0]])
    assert data.standardised(values).tolist() == [[-1.0, 0.0], [1.0, 0.0]]


def test_the_targets_of_sorting_are_the_inputs_in_order(data: ModuleType) -> None:
    inputs, targets = data.sorting(examples=50, length=4, digits=3)
    assert inputs.shape == (50, 7)
    assert torch.equal(targets, inputs[:, :4].sort(dim=1).values)
    assert torch.equal(inputs[:, 4:], targets[:, :-1])
