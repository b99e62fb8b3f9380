"""The feature h as a transformer of scikit-learn."""

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin

from contradiff.pretrained.images import Images
from contradiff.pretrained.model import ContraDiff


class ContraDiffFeatures(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """Turns images into features, so that any classifier of scikit-learn can follow.

        classifier = make_pipeline(ContraDiffFeatures("user/name"), LogisticRegression())
        classifier.fit(paths, labels)

    `model` is a loaded ContraDiff, or what `ContraDiff.from_pretrained` loads. Nothing is fitted.
    """

    def __init__(
        self,
        model: ContraDiff | str | Path,
        *,
        device: str | None = None,
        batch_size: int | None = None,
    ) -> None:
        self.model, self.device, self.batch_size = model, device, batch_size

    def fit(self, images: Images, labels: object = None) -> "ContraDiffFeatures":  # noqa: ARG002
        """Load the model; the images are not used."""
        if isinstance(self.model, ContraDiff):
            self.model_ = self.model
        else:
            self.model_ = ContraDiff.from_pretrained(self.model, device=self.device)
        self._n_features_out = self.model_.width
        return self

    def transform(self, images: Images) -> Float[np.ndarray, "num_images width"]:
        """Compute the features of images; their order in the call seeds their noise.

        Raises ValueError if an image cannot be read.
        """
        from sklearn.utils.validation import check_is_fitted

        check_is_fitted(self)
        return self.model_.features(images, batch_size=self.batch_size).numpy()

    def __sklearn_clone__(self) -> "ContraDiffFeatures":
        return type(self)(**self.get_params(deep=False))  # shares a loaded model: it never changes

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.no_validation = True
        return tags
