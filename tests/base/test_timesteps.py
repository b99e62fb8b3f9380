"""DDIM's timesteps are those of diffusers, and those with an even grid begin at the end."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from contradiff.base.loading import NoiseSchedule
from contradiff.base.timesteps import Timesteps

SPACINGS = ("leading", "trailing", "linspace")
STRIDE = 7  # not all 1000 numbers of steps, because diffusers takes a second for them


@pytest.mark.parametrize("spacing", SPACINGS)
def test_timesteps_are_those_of_diffusers(tiny_base: Path, spacing: str):
    given, timesteps = NoiseSchedule.of_base(tiny_base).scheduler, Timesteps.of_base(tiny_base)
    assert timesteps == Timesteps(1000, "leading", 1)  # as Stable Diffusion's
    schedule = NoiseSchedule(type(given).from_config(given.config, timestep_spacing=spacing))
    timesteps = replace(timesteps, spacing=spacing)
    for number in (*range(1, 1001, STRIDE), 30, 999, 1000):
        assert timesteps.of_ddim(number) == schedule.ddim_timesteps(number)


@pytest.mark.parametrize(
    ("spacing", "even", "uneven"),
    [
        # 30 steps of 33 begin at 958, which is 41 below the end; 27 of 37 begin at 963.
        ("leading", (1, 2, 20, 27, 50, 100, 125, 333, 999), (30, 150, 166, 600, 1000)),
        ("trailing", (1, 20, 50, 125, 1000), (30, 150, 333)),
        ("linspace", (1000,), (20, 50, 150, 999)),
    ],
)
def test_even_steps_begin_within_one_step_of_the_end(
    spacing: str, even: tuple[int, ...], uneven: tuple[int, ...]
):
    timesteps = Timesteps(1000, spacing, 1)
    assert [number for number in even + uneven if timesteps.are_even(number)] == list(even)
    for number in filter(timesteps.are_even, range(1, 1001)):
        assert 0 <= 999 - timesteps.of_ddim(number)[-1] <= 1000 // number


def test_missing_keys_have_ddims_defaults_and_wrong_ones_are_named(tiny_base: Path, tmp_path: Path):
    shutil.copytree(tiny_base / "scheduler", tmp_path / "scheduler")
    path = tmp_path / "scheduler/scheduler_config.json"
    content = json.loads(path.read_text())
    for key in ("timestep_spacing", "steps_offset", "num_train_timesteps"):
        del content[key]
    path.write_text(json.dumps(content))
    found = Timesteps.of_base(tmp_path)
    expected = NoiseSchedule.of_base(tmp_path)
    assert found == Timesteps(1000, "leading", 0)
    assert found.of_ddim(20) == expected.ddim_timesteps(20)
    for change in ({"timestep_spacing": "odd"}, {"steps_offset": "1"}, {"num_train_timesteps": 0}):
        path.write_text(json.dumps(content | change))
        with pytest.raises(ValueError, match=rf"scheduler_config\.json: .*{next(iter(change))}"):
            Timesteps.of_base(tmp_path)
