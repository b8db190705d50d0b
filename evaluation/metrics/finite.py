"""The check that scores are finite."""

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike

from utils import InputError


class NotFinite(InputError):
    """Scores that a metric would rank or compare are NaN or infinite."""


def require_finite(scores: ArrayLike, name: Callable[[int], str]) -> None:
    """Raise NotFinite unless all scores are finite.

    A comparison with NaN is false, so NaN would rank first in one metric and last in another.

    Args:
        scores: Scores [N, ...] of N samples.
        name: Function from the index of a sample to its name in the message.

    Raises:
        NotFinite: A score is NaN or infinite.
    """
    finite = np.isfinite(np.asarray(scores))
    bad = np.flatnonzero(~finite.all(axis=tuple(range(1, finite.ndim))))
    if len(bad):
        raise NotFinite(
            f"the scores of {len(bad)} of {len(finite)} samples are not finite (the first is"
            f" {name(int(bad[0]))})"
        )
