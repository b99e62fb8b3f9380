"""stages.class_condition: a table for the checkpoint there is, or a note that there is none."""

from stages.runtime.run import Run

import json
from pathlib import Path
from typing import Any

import pytest

from contradiff.config import parse
from contradiff.files import sha256_of
from contradiff.generation import class_table
from stages import class_condition
from tests.settings import ARCHITECTURE

TABLE, CHECKPOINT = Path("build/class_condition"), Path("build/pretrain")


def call(run: Run, **changes: Any) -> dict[str, Any]:
    """Run the stage; returns the config.json it wrote."""
    section: dict[str, Any] = {"epochs": 1, "width": 8, "drop": 0.1, "batch_size": 12, "lr": 0.01}
    content = ARCHITECTURE | {"seed": 0, "class_condition": section | {"lora": True} | changes}
    class_condition.main(parse(class_condition.Params, content, source="params.yaml"), run)
    return json.loads((TABLE / "config.json").read_text())


def test_a_table_is_trained_with_lora_or_without(trained_project: Run):
    embeddings = []
    for lora in (True, False):
        config = call(trained_project, lora=lora)
        assert config.pop("checkpoint_sha256") == sha256_of(CHECKPOINT / "model.safetensors")
        assert config.pop("lora") == lora
        assert config.pop("sha256") == {"table.safetensors": sha256_of(TABLE / "table.safetensors")}
        assert config == {"drop": 0.1, "num_classes": 3, "num_steps": 2, "width": 8}
        table = class_table.load_class_table(TABLE, checkpoint=CHECKPOINT)
        assert table.to_tokens.weight.any()
        embeddings.append(table.embedding.weight)
        # nothing to resume is left, and the checkpoint's own training run is still pretraining's
        assert list((trained_project.root / ".work/class_condition").iterdir()) == []
        assert not (trained_project.root / ".work/runs").exists()
    assert not embeddings[0].equal(embeddings[1])


def test_no_epochs_leave_a_note_and_need_no_model(
    trained_project: Run, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delattr(class_condition, "train")
    assert call(trained_project, epochs=0, batch_size=1000)["num_steps"] == 0
    assert [path.name for path in TABLE.iterdir()] == ["config.json"]
    expected = r'generate\.condition "class" .*class_condition\.epochs was 0'
    with pytest.raises(ValueError, match=expected):
        class_table.load_class_table(TABLE, checkpoint=CHECKPOINT)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_precision_is_that_of_pretraining(
    trained_project: Run, monkeypatch: pytest.MonkeyPatch, precision: str
):
    path = CHECKPOINT / "config.json"
    config = json.loads(path.read_text())
    config["params"]["pretrain"]["precision"] = precision
    path.write_text(json.dumps(config))
    given: dict[str, Any] = {}
    monkeypatch.setattr(class_table, "train_class_table", lambda *_, **own: given.update(own))
    call(trained_project)
    assert given["precision"] == precision
