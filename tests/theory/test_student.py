import math

import numpy as np
import pytest
from scipy.special import stdtrit

from zoscope.theory.spectrum import widening


@pytest.mark.parametrize("freedom", [1, 1.01, 1.5, 2, 2.7, 3, 5, 11.3, 40, 300, 1e4, 9e5])
def test_student_factor_is_that_of_scipy(freedom: float) -> None:
    assert widening(freedom) == pytest.approx(stdtrit(freedom, 0.975) / stdtrit(np.inf, 0.975), rel=1e-8)


def test_without_limit_it_is_one() -> None:
    assert widening(math.inf) == 1.0
    assert widening(1e7) == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize("freedom", [0.5, -1.0, math.nan])
def test_less_than_one_degree_of_freedom_is_refused(freedom: float) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        widening(freedom)
