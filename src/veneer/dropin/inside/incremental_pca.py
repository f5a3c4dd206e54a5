"""`peft.utils.incremental_pca`: principal components of data that arrives in batches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ...maths.svd import randomised_svd
from ...methods.inits.eva import Components, upright


class IncrementalPCA:
    """The principal components of rows, (rows, features), by the incremental SVD of Ross et al. (2008).

    After fitting, `components_` holds them, with `singular_values_`, `mean_`, `explained_variance_ratio_` and others.

    Raises:
        ValueError: a setting or the size of the data does not fit.
    """

    def __init__(
        self,
        n_components: int | None = None,
        copy: bool | None = True,
        batch_size: int | None = None,
        svd_driver: str | None = None,
        lowrank: bool = False,
        lowrank_q: int | None = None,
        lowrank_niter: int = 4,
        lowrank_seed: int | None = None,
    ) -> None:
        self.n_components = n_components
        self.copy = copy
        self.batch_size = batch_size
        self.svd_driver = svd_driver
        self.lowrank = lowrank
        self.lowrank_q = lowrank_q
        self.lowrank_niter = lowrank_niter
        self.lowrank_seed = lowrank_seed
        self.n_features_: int | None = None
        if lowrank and lowrank_q is None:
            if n_components is None:
                raise ValueError("n_components must be specified when using lowrank mode with lowrank_q=None.")
            self.lowrank_q = 2 * n_components
        elif lowrank and n_components is not None and lowrank_q < n_components:  # type: ignore[operator]
            raise ValueError("lowrank_q must be greater than or equal to n_components.")

    def fit(self, X: Any, check_input: bool = True) -> IncrementalPCA:
        """Fit the rows of X, in batches."""
        if check_input:
            X = self._checked(X)
        rows, features = X.shape
        self.batch_size = self.batch_size or 5 * features
        for batch in self.gen_batches(rows, int(self.batch_size), self.n_components or 0):
            self.partial_fit(X[batch], check_input=False)
        return self

    def partial_fit(self, X: Any, check_input: bool = True) -> IncrementalPCA:
        """Add the rows of X."""
        if check_input:
            X = self._checked(X)
        rows, features = X.shape
        is_first = self.n_features_ is None
        if is_first:
            self._start(rows, features)
        elif features != self.n_features_:
            raise ValueError("Number of features of the new batch does not match the number of features of the first.")
        found = self._found
        centred, correction = found._add_to_moments(X)
        if not is_first:
            centred = torch.cat([found.values[:, None] * found.vectors, centred, correction])
        S, Vh = self._svd(centred)
        Vh = upright(Vh)
        n = int(self.n_components)  # type: ignore[arg-type]
        found.vectors = Vh[:n]
        found.values = S[:n]
        self._note(S)
        return self

    def _start(self, rows: int, features: int) -> None:
        if self.n_components is None:
            self.n_components = min(rows, features)
        elif self.n_components > features:
            raise ValueError(
                f"n_components={self.n_components} invalid for n_features={features}, need more rows than columns for "
                "IncrementalPCA processing"
            )
        elif self.n_components > rows:
            raise ValueError(
                f"n_components={self.n_components} must be less or equal to the batch number of samples {rows}"
            )
        self.n_features_ = features
        self._found = Components(self.n_components, tau=1.0)

    def _svd(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        if self.lowrank:
            _, S, Vh = randomised_svd(rows, self.lowrank_q, self.lowrank_niter, seed=self.lowrank_seed or 0)  # type: ignore[arg-type]
        else:
            _, S, Vh = torch.linalg.svd(rows, full_matrices=False, driver=self.svd_driver)
        return S, Vh

    def _note(self, singular_values: Tensor) -> None:
        """Set the attributes that describe what has been fitted."""
        found = self._found
        variances = singular_values.double().square() / (found.count - 1)
        n = int(self.n_components)  # type: ignore[arg-type]
        left = variances[n:]
        self.components_ = found.vectors
        self.singular_values_ = found.values
        self.mean_ = found.mean
        self.n_samples_seen_ = found.count
        self.explained_variance_ = variances[:n]
        self.explained_variance_ratio_ = found.shares()
        self.noise_variance_ = left.mean() if len(left) else torch.tensor(0.0)

    def _checked(self, X: Any) -> Tensor:
        X = torch.as_tensor(X)
        if not X.is_floating_point():
            X = X.float()
        if self.copy:
            X = X.clone()
        rows, features = X.shape
        if self.n_components is not None and self.n_components > features:
            raise ValueError(
                f"n_components={self.n_components} invalid for n_features={features}, need more rows than columns for "
                "IncrementalPCA processing"
            )
        if self.n_components is not None and self.n_components > rows:
            raise ValueError(
                f"n_components={self.n_components} must be less or equal to the batch number of samples {rows}"
            )
        return X

    def transform(self, X: Tensor) -> Tensor:
        """The coordinates of rows along the components, (rows, n_components)."""
        centred = X - self.mean_.to(X)
        return centred @ self.components_.mT.to(X)

    @staticmethod
    def gen_batches(n: int, batch_size: int, min_batch_size: int = 0) -> Iterator[slice]:
        """Slices of `batch_size` rows; the last one is longer rather than shorter than `min_batch_size`."""
        start = 0
        while start < n:
            end = start + batch_size
            if end + min_batch_size > n:
                end = n
            yield slice(start, end)
            start = end
