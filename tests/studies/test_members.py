"""Members are known by all parameters except runtime, and DVC makes them as they are spelt."""

from pathlib import Path
from typing import Any

import pytest

from contradiff.config import read_params
from contradiff.studies.members import Member, changed, check_members, digest_of, members_of, spell
from contradiff.studies.study import read_study
from tests.settings import TINY
from tests.studies.project import PARAMS, STUDY, params

LAMBDAS = "- {title: λ = 0.1, set: {loss.lambda: 0.1}}"


def test_digests_leave_out_what_changes_no_result():
    own = digest_of(PARAMS)
    assert digest_of(params(runtime={"device": "cuda"})) == own
    assert digest_of(params(generate={"num_samples": 1000.0})) == own
    assert digest_of(params(seed=1)) != own
    assert digest_of(params(loss={"lambda": False})) != digest_of(params(loss={"lambda": 0}))


def test_members_have_every_row_and_seed_once(project: Path):
    members = members_of(read_study(project, "lambdas"), "lambdas", PARAMS)
    assert [member.name for member in members] == [
        f"lambdas-lambda{weight}-seed{seed}" for seed in (0, 1) for weight in (0, 0.1)
    ]
    assert members[0].options == ["-S", "loss.lambda=0", "-S", "seed=0"]
    assert members[3].params == params(seed=1, loss={"lambda": 0.1})


def test_rows_that_read_other_scores_share_members(project: Path):
    more = "- {title: other, set: {loss.lambda: 0.1}, read: {top1: probe.base}}"
    path = project / "studies/lambdas.yaml"
    path.write_text(STUDY.replace(LAMBDAS, f"{LAMBDAS}\n{more}"))
    assert len(members_of(read_study(project, "lambdas"), "lambdas", PARAMS)) == 4


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{title: default, set: {}}", 'row "default": repeats the point of row "λ = 0.1"'),
        ("{title: typo, set: {loss.lamda: 0}}", "params.yaml has no key loss.lamda"),
        ("{title: deep, set: {loss.lambda.x: 0}}", "params.yaml has no key loss.lambda.x"),
    ],
)
def test_rows_that_params_contradict_are_refused(row: str, message: str, project: Path):
    path = project / "studies/lambdas.yaml"
    path.write_text(STUDY.replace(LAMBDAS, f"{LAMBDAS}\n- {row}"))
    with pytest.raises(ValueError, match=r"studies/lambdas\.yaml: row") as fault:
        members_of(read_study(project, "lambdas"), "lambdas", PARAMS)
    assert message in str(fault.value)


def test_dvc_reads_values_as_they_are_spelt(tmp_path: Path):
    from dvc.utils.hydra import apply_overrides

    changes: dict[str, Any] = {
        "loss.lambda": 0.001,
        "pretrain.lr": 1e-05,
        "transfer.shots": [25, "full"],
        "features.timm_name": None,
        "class_condition.lora": False,
        "data.root": "a b: {c}",
        "conditioner.cond_view": "noise_both",
    }
    path = tmp_path / "params.yaml"
    path.write_bytes((Path(__file__).parents[2] / "presets/tiny.yaml").read_bytes())
    apply_overrides(path, [f"{key}={spell(value)}" for key, value in changes.items()])
    assert digest_of(read_params(path)) == digest_of(changed(TINY, changes, where=""))


def test_all_refused_members_are_named_before_anything_is_queued(tiny_base: Path):
    base = changed(TINY, {"base.path": str(tiny_base), "lora.targets": ["attn2.to_q"]}, where="")
    members = [
        Member(name, changes, 0, changed(base, changes, where=""))
        for name, changes in (
            ("good", {}),
            ("negative", {"loss.lambda": -1.0}),
            ("untrained", {"generate.condition": "class"}),
            ("nowhere", {"lora.targets": ["attn9"]}),
        )
    ]
    with pytest.raises(ValueError, match="none is queued") as fault:
        check_members(members, root=Path())
    lines = str(fault.value).splitlines()
    assert lines[0] == "params.yaml's rules refuse 3 of 4 members; none is queued"
    assert [line.partition(":")[0] for line in lines[1:]] == ["negative", "untrained", "nowhere"]
    assert "loss.lambda: Input should be greater than or equal to 0" in lines[1]
