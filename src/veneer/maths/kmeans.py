"""k-means that gives the same clusters on every machine, and those of scikit-learn (init="random", n_init=1)."""

from __future__ import annotations

import numpy as np

SEED = 123456789
"""Of the rows that the centres start at."""
TOLERANCE = 1e-4
"""How far the centres may still move in the end, relative to the variance of the points."""


def kmeans(X: np.ndarray, k: int, iterations: int) -> np.ndarray:
    """The cluster of each row of X, by Lloyd's algorithm: (rows,) of 0 ... k - 1."""
    X = X - X.mean(axis=0)
    tolerance, old = TOLERANCE * X.var(axis=0).mean(), np.full(len(X), -1)
    share = np.full(len(X), 1 / len(X), dtype=X.dtype)
    centres = X[np.random.RandomState(SEED).choice(len(X), size=k, replace=False, p=share)]
    for _ in range(iterations):
        labels = nearest(X, centres)
        moved = means(X, labels, centres)
        shift, centres = ((moved - centres) ** 2).sum(), moved
        if np.array_equal(labels, old):
            return labels
        if shift <= tolerance:
            break
        old = labels
    return nearest(X, centres)


def nearest(X: np.ndarray, centres: np.ndarray) -> np.ndarray:
    return ((centres**2).sum(axis=1) - 2 * X @ centres.T).argmin(axis=1)


def means(X: np.ndarray, labels: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """The mean of each cluster; one without points takes the point that is farthest from its centre."""
    empty = np.setdiff1d(np.arange(len(centres)), labels)
    if len(empty):
        labels = labels.copy()
        labels[((X - centres[labels]) ** 2).sum(axis=1).argsort()[::-1][: len(empty)]] = empty
    members = (labels == np.arange(len(centres))[:, None]).astype(X.dtype)
    return members @ X / members.sum(axis=1, keepdims=True).clip(1)
