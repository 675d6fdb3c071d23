"""How good probabilities are, against what turned out to be true.

Legend: N probabilities.
"""

from collections.abc import Sequence

import numpy as np

BINS = 10


def calibration(probabilities: Sequence[float], truth: Sequence[bool]) -> dict[str, float]:
    """Accuracy at 1/2, Brier score (mean squared difference) and expected calibration error of N probabilities.

    The calibration error puts the probabilities into 10 bins of equal width, and is the mean over the bins, weighted by
    their counts, of |mean probability - share that is true| (Guo et al., arXiv 1706.04599, eq. 3, of the event).

    Returns:
        ``count``, ``share_true``, ``accuracy``, ``brier`` and ``ece``; the count alone where there are none.
    """
    if not len(probabilities):
        return {"count": 0.0}
    p, y = np.asarray(probabilities, np.float64), np.asarray(truth, np.float64)  # [N]
    bins = np.minimum((p * BINS).astype(int), BINS - 1)
    gaps = [abs((p - y)[bins == index].sum()) for index in range(BINS)]
    return {
        "count": float(len(p)),
        "share_true": float(y.mean()),
        "accuracy": float(((p > 0.5) == (y > 0.5)).mean()),
        "brier": float(((p - y) ** 2).mean()),
        "ece": float(sum(gaps) / len(p)),
    }


def auc(higher: Sequence[float], lower: Sequence[float]) -> float | None:
    """Probability that a score of those which should be higher is above one that should be lower, ties half.

    It is the area under the receiver operating characteristic. None where either is empty.
    """
    if not len(higher) or not len(lower):
        return None
    gaps = np.subtract.outer(np.asarray(higher, np.float64), np.asarray(lower, np.float64))
    return float(((gaps > 0) + 0.5 * (gaps == 0)).mean())
