"""Random rows, many of them of values at which kernels go wrong."""

import ml_dtypes
import numpy as np

INF, NAN = float("inf"), float("nan")
EDGES = np.array(
    [INF, -INF, NAN, 3e38, -3e38, 1e30, -1e30, 1e4, -1e4, 104.0, -104.0, 88.8, -88.8, 17.0, -17.0, 1e-7, 1e-30, 1e-40]
)
SCALES = (1e-3, 1.0, 1.0, 5.0, 30.0, 200.0)


def rounded(array: np.ndarray, dtype: str) -> np.ndarray:
    """The nearest numbers that the dtype has, in a dtype that NumPy computes with."""
    if dtype == "float64":
        return np.asarray(array, "float64")
    with np.errstate(over="ignore"):
        return np.asarray(array).astype(getattr(ml_dtypes, dtype, None) or dtype).astype("float32")


def logits(rng: np.random.Generator, rows: int, classes: int, *, infinite: bool = True) -> np.ndarray:
    """Rows of logits: of all sizes, with ties, and with one or more edge values."""
    x = rng.standard_normal((rows, classes)) * rng.choice(SCALES, (rows, 1))
    kind = rng.integers(0, 8, rows)
    ties = kind == 0
    x[ties] = np.round(x[ties])
    # One class far above the others.
    above = np.flatnonzero(kind == 1)
    x[above, rng.integers(0, classes, len(above))] += rng.uniform(5, 110, len(above))
    edges = EDGES if infinite else EDGES[3:]
    for i in np.flatnonzero(kind >= 6):
        at = rng.integers(0, classes, rng.integers(1, min(classes, 3) + 1))
        x[i, at] = rng.choice(edges, len(at))
    if rows and infinite:
        x[rng.integers(rows)] = -INF
        x[rng.integers(rows)] = 3e38
    return x


def distributions(rng: np.random.Generator, rows: int, classes: int) -> np.ndarray:
    """Rows of targets: one-hot, soft, with zeros, of any sum, and all zeros."""
    q = rng.dirichlet(np.full(classes, 0.4), rows)
    kind = rng.integers(0, 6, rows)
    one_hot = kind <= 1
    q[one_hot] = np.eye(classes)[rng.integers(0, classes, one_hot.sum())]
    q[kind == 2] *= rng.uniform(0, 3, ((kind == 2).sum(), 1))
    q[kind == 3] = 0.0
    return q


def probabilities(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Binary labels: 0, 1 and between."""
    return np.where(rng.random(shape) < 0.7, rng.integers(0, 2, shape), rng.random(shape))


def weights(rng: np.random.Generator, shape: tuple[int, ...], *, negative: bool = False) -> np.ndarray:
    """Weights of few binary digits, so that sums of them are exact; a fourth of them 0."""
    w = rng.integers(-4 if negative else 0, 9, shape) / 4
    return np.where(rng.random(shape) < 0.25, 0.0, w)


def upstream(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Upstream gradients, some of them 0."""
    return np.where(rng.random(shape) < 0.15, 0.0, rng.standard_normal(shape))
