"""The transformer follows scikit-learn's rules."""

from pathlib import Path

import joblib
import numpy as np
import pytest
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline

from contradiff.pretrained.folder import Parts
from contradiff.pretrained.model import ContraDiff
from contradiff.pretrained.transformer import ContraDiffFeatures


def test_it_works_in_pipelines_and_cross_validation(parts: Parts, tmp_path: Path):
    model = ContraDiff(parts, device="cpu")
    images = np.random.default_rng(0).integers(0, 100, (12, 20, 20, 3), dtype=np.uint8)
    images[::2] += 120
    labels = ["dark", "bright"] * 6
    transformer = ContraDiffFeatures(model, batch_size=4)
    with pytest.raises(NotFittedError):
        transformer.transform(images)
    assert clone(transformer).model is model
    features = transformer.fit_transform(list(images))
    assert features.shape == (12, 16)
    np.testing.assert_array_equal(features, model.features(images, batch_size=4).numpy())
    names = transformer.get_feature_names_out()
    assert list(names[:2]) == ["contradifffeatures0", "contradifffeatures1"]
    assert transformer.set_output(transform="default").transform(images[:1]).shape == (1, 16)
    classifier = make_pipeline(transformer, LogisticRegression())
    for form in (images, list(images)):
        assert cross_val_score(classifier, form, labels, cv=3).mean() > 0.8
    classifier.fit(images, labels)
    joblib.dump(classifier, tmp_path / "classifier")
    kept = joblib.load(tmp_path / "classifier")
    np.testing.assert_array_equal(kept.predict_proba(images), classifier.predict_proba(images))
