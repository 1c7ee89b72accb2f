"""Numbers in figures and sentences: a true minus, no negative zero."""

from __future__ import annotations

import numpy as np

from probes.jsonable import jsonable
from probes.numbers import plain, signed, span


def test_minus_signs_and_zeros() -> None:
    assert [signed(value) for value in (0.456, -0.456, -0.004, 0.0)] == ["+0.46", "−0.46", "+0.00", "+0.00"]
    assert [plain(value, 1) for value in (0.46, -0.46, -0.04)] == ["0.5", "−0.5", "0.0"]
    assert span(-1, 2, digits=0) == "−1 to +2"


def test_json_values_hold_neither_nan_nor_numpy() -> None:
    value = {1: (np.float32(0.5), np.int64(3), float("nan")), "b": [float("-inf"), None, np.bool_(True)]}
    assert jsonable(value) == {"1": [0.5, 3, None], "b": [None, None, True]}
    assert type(jsonable(np.float64(1))) is float
