"""The start of a run, before Ray: what the driver is given."""

import pytest

from spin_ray.config.recipe import SpinConfig
from spin_ray.inputs.check import check_recipe
from spin_ray.loop import driver, launch
from spin_ray.run_dir.run_dir import RunDir
from spin_ray.run_dir.storage import Storage

RECIPE = {
    "model": {"path": "embedded:tiny-llama", "max_length": 128},
    "data": {"train": "embedded:arithmetic-train"},
    "generation": {"sampling": {"max_tokens": 24}},
}


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_recipe_that_names_no_precision_goes_on_in_the_precision_of_its_run(tmp_path, monkeypatch, precision):
    began = SpinConfig.model_validate(RECIPE | {"train": {"precision": precision}})
    RunDir(Storage(tmp_path / "run")).begin(began, check_recipe(began).facts())
    driven = []
    monkeypatch.setattr(driver, "spin", lambda run, config, *_: driven.append(config))
    launch.run_spin(SpinConfig.model_validate(RECIPE), tmp_path / "run")
    assert driven == [began]
