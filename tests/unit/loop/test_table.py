"""An algorithm says what it needs of a recipe, and the check at the start reads it."""

import re
from typing import Any

import pytest
import torch

from spin_ray.config.recipe import SpinConfig
from spin_ray.errors import ConfigError
from spin_ray.loop.algorithms.base import Algorithm
from spin_ray.loop.algorithms.table import ALGORITHMS, check_algorithm, find_algorithm
from tests.support.paths import RECIPES

MINIMAL: dict[str, Any] = {"model": {"path": "m"}, "data": {"train": "d"}}


def parse(**sections: Any) -> SpinConfig:
    return SpinConfig.model_validate(MINIMAL | sections)


def problems(**sections: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        check_algorithm(parse(**sections))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("sections", "problem"),
    [
        ({"algorithm": "sppo", "generation": {"samples_per_prompt": 5}}, "scorer: algorithm sppo needs it"),
        (
            {"algorithm": "sppo", "scorer": {"path": "judge"}},
            "generation.samples_per_prompt: sppo compares samples of a prompt",
        ),
        ({"algorithm": "self_reinforcement", "sft": {}}, "data.questions: algorithm self_reinforcement needs it"),
        ({"algorithm": "seft"}, "reviser: algorithm seft needs it"),
        ({"reviser": {}}, "reviser: is for algorithm seft, not for spin"),
        ({"data": {"train": "d", "questions": "q"}}, "data.questions: is for algorithm self_reinforcement and seft"),
        ({"algorithm": "dpo", "objective": {"window": "all"}}, "objective.window: is for algorithm spin"),
        ({"algorithm": "dpo", "objective": {"reference_alpha": 0.5}}, "objective.reference_alpha: is for algorithm"),
    ],
)
def test_settings_that_an_algorithm_lacks_or_does_not_read_are_refused(sections, problem):
    assert problem in problems(**sections)


def test_sppo_has_a_loss_of_its_own():
    found = problems(
        algorithm="sppo", scorer={"path": "m"}, generation={"samples_per_prompt": 5}, objective={"loss": "hinge"}
    )
    assert found == "objective.loss: sppo has a loss of its own; leave it out"


def test_a_mesh_is_for_backends_that_build_it():
    """Another would give each rank of a tensor group the whole gradient of its packs, which then counts twice."""
    found = problems(train={"backend": "collections:Counter", "mesh": {"shard": 1}})
    assert found == "train.mesh: collections:Counter is no subclass of Fsdp2Backend, which builds it; leave it out"


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_here_has_what_its_algorithm_needs(recipe):
    from spin_ray.config.load import load_config

    check_algorithm(load_config(recipe, {"data.train": "d", "data.heldout": "h"}))


def test_an_unknown_algorithm_is_told_which_are_known():
    with pytest.raises(ConfigError, match="'spim' is unknown; use spin, continued_sft, dpo, sppo, self_reinforcement"):
        find_algorithm("spim")


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("no_such_package:Mine", "cannot be imported"),
        ("json:Mine", "module json has no Mine"),
        ("json:JSONDecoder", r"json:JSONDecoder is no subclass of spin_ray\.loop\.algorithms\.base\.Algorithm"),
    ],
)
def test_a_path_that_leads_to_no_algorithm_is_told_before_anything_runs(path, reason):
    with pytest.raises(ConfigError, match=f"algorithm: .*{reason}"):
        check_algorithm(parse(algorithm=path))


@pytest.mark.parametrize(
    ("sections", "setting"),
    [
        ({"objective": {"loss": "no_such_package:loss"}}, "objective.loss"),
        ({"train": {"backend": "no_such_package:Backend"}}, "train.backend"),
        ({"train": {"optimizer": {"name": "no_such_package:Optimizer"}}}, "optimizer.name"),
        ({"sft": {"optimizer": {"name": "no_such_package:Optimizer"}}}, "optimizer.name"),
    ],
)
def test_other_paths_that_lead_nowhere_are_told_as_early(sections, setting):
    assert problems(**sections).startswith(f"{setting}: no_such_package:")


class NeedsWins:
    needs_reference = True
    needs_wins = True
    per = "pair"

    def __call__(self, policy, reference, wins, beta):
        return policy.real.sum()

    def margin(self, policy, reference, beta):
        return None


class ReferenceFree(NeedsWins):
    needs_reference = needs_wins = False


def descent(parameters, lr):
    return torch.optim.SGD(parameters, lr=lr)


needs_wins, reference_free, three = NeedsWins(), ReferenceFree(), 3


@pytest.mark.parametrize(
    ("sections", "problem"),
    [
        (
            {"objective": {"loss": f"{__name__}:needs_wins"}},
            "needs win probabilities, which algorithm spin does not make",
        ),
        (
            {"objective": {"loss": f"{__name__}:reference_free", "reference_alpha": 0.5}},
            "objective.reference_alpha: the loss .* has no reference",
        ),
        ({"train": {"optimizer": {"name": f"{__name__}:three"}}}, "three is nothing that can be called"),
        (
            {"train": {"optimizer": {"name": f"{__name__}:descent", "weight_decay": 0.1}}},
            "weight_decay: .* takes no argument weight_decay",
        ),
    ],
)
def test_a_loss_or_an_optimizer_that_the_recipe_cannot_serve_is_told_before_anything_runs(sections, problem):
    assert re.search(problem, problems(**sections))


def test_a_module_that_fails_while_it_is_imported_is_named_with_its_error(tmp_path, monkeypatch):
    (tmp_path / "breaks.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    assert "breaks:Mine cannot be imported (ZeroDivisionError: division by zero)" in problems(algorithm="breaks:Mine")


def test_an_algorithm_is_found_once_by_its_name_and_made_anew_by_its_path():
    assert find_algorithm("spin") is ALGORITHMS["spin"]
    assert type(find_algorithm("spin_ray.loop.algorithms.spin:Spin")) is type(ALGORITHMS["spin"])
    assert all(isinstance(each, Algorithm) for each in ALGORITHMS.values())
