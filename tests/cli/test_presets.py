from pathlib import Path

import pytest

from contradiff.cli.presets import preset_names, use_preset


def test_a_preset_replaces_params_yaml_and_own_changes_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    presets, here = tmp_path / "presets", tmp_path / "here"
    presets.mkdir()
    here.mkdir()
    for name in ("one", "two"):
        (presets / f"{name}.yaml").write_text(name)
    monkeypatch.setattr("contradiff.cli.presets.PRESETS", presets)
    monkeypatch.chdir(here)
    assert preset_names() == ["one", "two"]
    with pytest.raises(ValueError, match="'' is no preset; type one of: one, two"):
        use_preset("")
    assert not Path("params.yaml").exists()
    params, backup = Path("params.yaml"), Path("params.yaml.bak")
    assert use_preset("one") == ["params.yaml is now presets/one.yaml"]
    assert use_preset("two") == ["params.yaml is now presets/two.yaml"]
    assert (params.read_text(), backup.exists()) == ("two", False)
    params.write_text("mine")
    assert len(use_preset("one")) == 2
    assert (params.read_text(), backup.read_text()) == ("one", "mine")
