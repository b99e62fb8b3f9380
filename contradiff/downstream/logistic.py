"""Logistic regression on standardised features, trained to convergence (scikit-learn's L-BFGS).

choose C on held-out training samples => fit on all training samples => test

Each feature is scaled to mean 0 and variance 1 over the training samples. C is the inverse of the
L2 penalty: a small C regularises strongly.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from contradiff.downstream.accuracy import Accuracy, accuracy_of
from contradiff.downstream.linear import LinearProbe
from contradiff.imports import slow_import

SEARCH_TOLERANCE = 1e-3
"""Largest gradient at which a fit in the choice of C ends. The default 1e-4 takes twice as long."""

Fold: TypeAlias = tuple[Int64[np.ndarray, " _"], Int64[np.ndarray, " _"]]
"""Two sets of rows of the training samples: rows to fit a classifier to, and rows to test C on."""


@dataclass(frozen=True)
class LogisticScore:
    """A logistic regression in float64, its accuracy and C, and whether its solver converged."""

    accuracy: Accuracy
    c: float
    converged: bool
    probe: LinearProbe = field(compare=False, repr=False)

    def check(self, log: Callable[[str], None], section: str) -> None:
        """Send a message to `log` if the solver has not converged."""
        if not self.converged:
            fault = f"logistic regression with C = {self.c:g} has not converged"
            log(f"{section}.cs: {fault}; remove the largest C")

    def metrics(self) -> dict[str, Any]:
        """Return the accuracy, its interval, C and whether the solver converged."""
        return self.accuracy.metrics() | {"c": self.c, "converged": self.converged}


def logistic_score(
    train: tuple[Float[Tensor, "n d"], Int64[Tensor, " n"]],
    test: tuple[Float[Tensor, "m d"], Int64[Tensor, " m"]],
    *,
    num_classes: int,
    cs: Sequence[float],
    folds: Sequence[Fold],
) -> LogisticScore:
    """Choose C among `cs`, fit to all of `train`, and test on `test`: pairs (features, labels).

    The best C is the one with the most correct classifications of held-out samples of the `folds`.
    If several are best, the smallest is chosen. Without folds, the middle one of `cs` is chosen.
    Raises ValueError if all labels of `train` are equal, or if `test` is empty.
    """
    with slow_import():
        from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    features, labels = train[0].double().cpu().numpy(), train[1].cpu().numpy()
    if len(np.unique(labels)) < 2 or len(test[1]) == 0:
        needs = "training images of at least two classes, and images to test on"
        raise ValueError(f"logistic regression needs {needs}")
    # In float64 the result does not depend on the number of threads, and one is the fastest here.
    with threadpool_limits(1), warnings.catch_warnings(record=True) as found:
        c = _choose_c(features, labels, cs=sorted(cs), folds=folds)
        warnings.simplefilter("always", ConvergenceWarning)
        classifier = _classifier(c).fit(features, labels)
    probe = _as_probe(*classifier, num_classes=num_classes)
    with torch.no_grad():
        accuracy = accuracy_of(probe(test[0].double().cpu()), test[1].cpu())
    converged = not any(issubclass(each.category, ConvergenceWarning) for each in found)
    return LogisticScore(accuracy, c, converged, probe)


def _as_probe(scaler: Any, regression: Any, *, num_classes: int) -> LinearProbe:
    """Return scikit-learn's classifier as a LinearProbe, whose softmax gives its probabilities.

    A class without training samples has probability 0.
    """
    weight, bias = torch.from_numpy(regression.coef_), torch.from_numpy(regression.intercept_)
    known = torch.from_numpy(regression.classes_)
    if len(known) == 2:  # for two classes, scikit-learn has only the second logit
        weight, bias = (torch.cat([torch.zeros_like(each), each]) for each in (weight, bias))
    probe = LinearProbe(weight.shape[1], num_classes, generator=torch.Generator()).double().eval()
    variance = torch.from_numpy(scaler.scale_).square() - probe.norm.eps
    with torch.no_grad():
        probe.linear.weight.zero_()[known] = weight
        probe.linear.bias.fill_(-torch.inf)[known] = bias
        probe.norm.load_state_dict(
            {"running_mean": torch.from_numpy(scaler.mean_), "running_var": variance}, strict=False
        )
    return probe.requires_grad_(requires_grad=False)


def stratified_folds(labels: Int64[Tensor, " n"], *, seed: int) -> list[Fold]:
    """Split samples into folds, each with the same share of each class.

    The number of folds is the size of the smallest class, at most 5. If this size is 1, the list of
    folds is empty.
    """
    with slow_import():
        from sklearn.model_selection import StratifiedKFold

    num_folds = min(5, int(labels.unique(return_counts=True)[1].min()))
    if num_folds < 2:
        return []
    splitter = StratifiedKFold(num_folds, shuffle=True, random_state=seed % 2**32)
    return list(splitter.split(np.zeros(len(labels)), labels.cpu().numpy()))


def _choose_c(
    features: Float[np.ndarray, "n d"],
    labels: Int64[np.ndarray, " n"],
    *,
    cs: Sequence[float],
    folds: Sequence[Fold],
) -> float:
    with slow_import():
        from sklearn.metrics import accuracy_score, make_scorer
        from sklearn.model_selection import GridSearchCV

    if not folds or len(cs) == 1:
        return cs[(len(cs) - 1) // 2]
    # Sums of counts are exact, so equally good values of C get equal scores.
    count = make_scorer(accuracy_score, normalize=False)
    grid = {"logisticregression__C": cs}
    rough = _classifier(cs[0], tol=SEARCH_TOLERANCE)
    search = GridSearchCV(rough, grid, scoring=count, cv=folds, refit=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # only the last fit must converge
        search.fit(features, labels)
    return float(search.best_params_["logisticregression__C"])


def _classifier(c: float, *, tol: float = 1e-4) -> Any:
    with slow_import():
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression(C=c, tol=tol, max_iter=5000))
