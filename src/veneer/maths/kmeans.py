"""k-means with the same clusters on every machine, equal to scikit-learn's with `init="random", n_init=1`."""

from __future__ import annotations

import numpy as np

SEED = 123456789
"""The seed that draws the initial centres."""
TOLERANCE = 1e-4
"""Stop when the centres move by less, relative to the variance of the points."""


def kmeans(X: np.ndarray, k: int, iterations: int) -> np.ndarray:
    """The cluster of each row of X, by Lloyd's algorithm: (rows,) of 0 ... k - 1."""
    X = X - X.mean(axis=0)
    tolerance = TOLERANCE * X.var(axis=0).mean()
    centres = X[_initial_rows(X, k)]
    former_labels = np.full(len(X), -1)
    for _ in range(iterations):
        labels = nearest(X, centres)
        former_centres = centres
        centres = means(X, labels, centres)
        if np.array_equal(labels, former_labels):
            return labels
        shift = ((centres - former_centres) ** 2).sum()
        if shift <= tolerance:
            break
        former_labels = labels
    return nearest(X, centres)


def _initial_rows(X: np.ndarray, k: int) -> np.ndarray:
    """k random rows; with explicit probabilities, as scikit-learn draws them."""
    n = len(X)
    p = np.full(n, 1 / n, dtype=X.dtype)
    return np.random.RandomState(SEED).choice(n, size=k, replace=False, p=p)


def nearest(X: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """The index of the nearest centre for each row of X."""
    squares = (centres**2).sum(axis=1)
    distances = squares - 2 * X @ centres.T  # less each row's own square, which does not change the order
    return distances.argmin(axis=1)


def means(X: np.ndarray, labels: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """The mean of each cluster; an empty cluster takes the point farthest from its centre."""
    clusters = np.arange(len(centres))
    empty = np.setdiff1d(clusters, labels)
    if len(empty):
        distances = ((X - centres[labels]) ** 2).sum(axis=1)
        farthest = distances.argsort()[::-1]
        labels = labels.copy()
        labels[farthest[: len(empty)]] = empty
    members = (labels == clusters[:, None]).astype(X.dtype)  # (k, rows)
    counts = members.sum(axis=1, keepdims=True)
    return members @ X / counts.clip(1)
