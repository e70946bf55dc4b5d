"""The networks, trained and decomposed once for all tests that ask for them."""

import pytest

from .networks import Subject, convolutional, decoder, rectified


@pytest.fixture(scope="session")
def cnn() -> Subject:
    return Subject.of(convolutional())


@pytest.fixture(scope="session")
def relu() -> Subject:
    return Subject.of(rectified())


@pytest.fixture(scope="session")
def transformer() -> Subject:
    return Subject.of(decoder())
