"""stages.extractor: what a classifier's card states, and how one that learned nothing is named."""

from stages.runtime.run import Run

from dataclasses import replace

import pytest

from contradiff.config import parse
from contradiff.evaluation.extractors import read_extractor_card
from stages import extractor
from tests.settings import TINY


def test_a_classifier_that_learned_nothing_is_named(
    trained_project: Run, capsys: pytest.CaptureFixture[str]
):
    """One step on few images of three classes; eight validation images."""
    small = {"width": 2, "epochs": 1, "batch_size": 24, "lr": 1e-9}
    changes = {"extractor": TINY["extractor"] | small, "data": TINY["data"] | {"image_size": 32}}
    params = parse(extractor.Params, TINY | changes, source="params.yaml")
    extractor.main(params, replace(trained_project, stage="extractor"))
    card = read_extractor_card(extractor.EXTRACTOR)
    assert (card.val_count, card.val_chance) == (8, 3 / 8)
    assert card.weakness is not None
    assert f"`score` will give no scores: {card.weakness}" in capsys.readouterr().err
