"""An algorithm says what it needs of a recipe, and the check at the start reads it."""

import re
import sys
from typing import Any

import pytest
import torch

from spin_ray.config import packages
from spin_ray.config.recipe import SpinConfig
from spin_ray.errors import ConfigError
from spin_ray.learner.backends import BACKENDS, METHODS, find_backend, make_backend
from spin_ray.learner.backends.base import BackendSettings, TrainBackend
from spin_ray.learner.step import Objective
from spin_ray.loop.algorithms.base import SPIN_FIELDS, Algorithm
from spin_ray.loop.algorithms.table import ALGORITHMS, check_algorithm, find_algorithm, imported_by_workers
from tests.support.paths import RECIPES

MINIMAL: dict[str, Any] = {"model": {"path": "m"}, "data": {"train": "d"}}


REINFORCED: dict[str, Any] = {"algorithm": "self_reinforcement", "sft": {}, "data": {"train": "d", "questions": "q"}}


class OfTokens:
    """A Loss of the tokens of y."""

    needs_reference = False
    needs_wins = False
    per = "token"

    def __call__(self, policy, reference, wins, beta):
        raise NotImplementedError

    def margin(self, policy, reference, beta):
        return None


of_tokens = OfTokens()


class Outside(Algorithm):
    def make_pairs(self, turn):
        raise NotImplementedError

    def objective(self, config, iteration):
        raise NotImplementedError


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
        ({"sdft": {}}, "sdft: is for algorithm sdft, not for spin"),
        (
            {"algorithm": "sdft", "objective": {"loss": "hinge"}},
            "objective.loss: is for algorithm spin and continued_sft and dpo and",
        ),
        ({"algorithm": "sdft", "objective": {"sft_weight": 1}}, "objective.sft_weight: is for algorithm spin"),
        (
            {"algorithm": "sdft", "train": {"backend": "builtins:dict"}},
            "train.backend: builtins:dict has no method read",
        ),
        ({"algorithm": "tspin", "objective": {"positive_weight": 1}}, "objective.positive_weight: is for algorithm"),
        (
            {"algorithm": "tspin", "data": {"train": "d", "prompts_per_iteration": 3}},
            "data.prompts_per_iteration: tspin needs θ_0's response to each prompt",
        ),
        (
            {"algorithm": "tspin", "train": {"pack_length": 4095}},
            "train.pack_length: 4095 may not hold a prompt with its responses in algorithm tspin; raise it to 4096",
        ),
        ({"objective": {"history_weight": 1}}, "objective.history_weight: is for algorithm tspin, not for spin"),
        (
            {"objective": {"loss": "space", "length_normalised": True}},
            "objective.length_normalised: the loss space takes log-ratios as they are",
        ),
        (
            {"objective": {"reference_alpha": 0.5, "length_normalised": True}},
            "objective.length_normalised: the normaliser of the geometric reference does not cancel between means",
        ),
        (
            {"algorithm": "dpo", "generation": {"samples_per_prompt": 2}},
            "generation.samples_per_prompt: dpo samples no responses to training prompts",
        ),
        ({"objective": {"mu": 2}}, "objective.mu: is for the loss space, not for logistic"),
        ({"algorithm": "continued_sft", "objective": {"mu": 2}}, "objective.mu: is for the loss space"),
        ({"algorithm": "continued_sft", "objective": {"history_weight": 1}}, "objective.history_weight: is for algori"),
        (
            {"objective": {"loss": "space", "reference_alpha": 0.5}},
            "objective.reference_alpha: the loss space takes the log-ratio of y alone",
        ),
        (
            {"objective": {"positive_weight": 50, "reference_alpha": 0.5}},
            "objective.reference_alpha: objective.positive_weight takes the log-ratio of y alone",
        ),
        (
            {"objective": {"loss": f"{__name__}:of_tokens", "sft_weight": 0.1}},
            "objective.sft_weight: the loss tests.unit.loop.test_table:of_tokens is one of tokens",
        ),
        (
            {"algorithm": f"{__name__}:Outside", "objective": {"window": "all"}},
            "or name it in objective_fields of tests.unit.loop.test_table:Outside",
        ),
        (
            {"algorithm": "dpo", "model": {"path": "m", "max_length": 2048}, "train": {"pack_length": 4094}},
            "train.pack_length: 4094 may not hold a prompt with its responses in algorithm dpo; raise it to 4095",
        ),
        (
            {**REINFORCED, "self_filter": {"min_grade": 0.9}},
            "self_filter.min_grade: needs self_filter.grade",
        ),
        ({**REINFORCED, "self_filter": {"min_agreement": 0.9}}, "self_filter.min_agreement: one sample agrees with it"),
        (
            {"objective": {"loss": "space", "positive_weight": 1}},
            "objective.positive_weight: the loss space is no func",
        ),
    ],
)
def test_settings_that_an_algorithm_lacks_or_does_not_read_are_refused(sections, problem):
    assert problem in problems(**sections)


SPPO: dict[str, Any] = {"algorithm": "sppo", "scorer": {"path": "m"}, "generation": {"samples_per_prompt": 5}}


@pytest.mark.parametrize(
    ("field", "value", "readers"),
    [
        ("loss", "hinge", "spin and continued_sft and dpo and self_reinforcement"),
        ("sft_weight", 0.1, "spin and continued_sft and dpo and self_reinforcement and tspin"),
        ("length_normalised", True, "spin and continued_sft and dpo and self_reinforcement and tspin"),
        ("keep_identical", True, "spin and continued_sft and dpo and self_reinforcement and tspin"),
        ("window", 2**10, "spin and continued_sft"),
    ],
)
def test_what_sppo_would_not_read_of_the_objective_is_refused(field, value, readers):
    found = problems(**SPPO, objective={field: value})
    assert found == f"objective.{field}: is for algorithm {readers}, not for sppo; leave it out"


def test_a_window_of_one_is_what_sppo_does():
    check_algorithm(parse(**SPPO, objective={"window": 1, "beta": 0.001}))


@pytest.mark.parametrize("algorithm", ["sdft", "seft", "tspin", "dpo"])
def test_every_evaluation_reads_beta(algorithm):
    reviser = {"reviser": {}} if algorithm == "seft" else {}
    check_algorithm(parse(algorithm=algorithm, objective={"beta": 0.7}, **reviser))


def test_any_spin_recipe_is_its_own_baseline():
    check_algorithm(parse(algorithm="continued_sft", objective={"window": "all", "reference_alpha": 0.5, "beta": 1}))


@pytest.mark.parametrize(
    ("missing", "sections", "told"),
    [
        ("bitsandbytes", {"train": {"lora": {"base": "nf4", "merge": False}}}, "train.lora.base: nf4: QUANTISED"),
        ("bitsandbytes", {"train": {"optimizer": {"name": "adamw_8bit"}}}, "optimizer.name: adamw_8bit: QUANTISED"),
        ("peft", {"train": {"lora": {}}}, "train.lora: LORA"),
        ("deepspeed", {"train": {"backend": "deepspeed"}}, "train.backend: deepspeed: DEEPSPEED"),
        ("wandb", {"tracking": {"wandb": {}}}, "tracking.wandb: WANDB"),
        ("mlflow", {"tracking": {"mlflow": {}}}, "tracking.mlflow: MLFLOW"),
        ("vllm", {}, "generation: CPU"),
        ("vllm", {"generation": {"resources": {"gpus": 1}}}, "generation: GPU"),
        ("vllm", {"algorithm": "continued_sft", "data": {"train": "d", "heldout": "h"}}, "generation: CPU"),
        ("vllm", {"algorithm": "continued_sft"}, None),
        ("wandb", {}, None),
    ],
)
def test_a_missing_package_is_told_with_its_cure_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, missing: str, sections: dict[str, Any], told: str | None
) -> None:
    """DeepSpeed, vLLM and a tracker were missed hours into a run."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(packages, "find_spec", lambda name: None if name == missing else name)
    if told is None:
        check_algorithm(parse(**sections))
        return
    setting, _, extra = told.rpartition(": ")
    cure = f"pip install 'spin-ray[{extra.lower()}]'"
    assert problems(**sections) == f"{setting}: needs the package {missing}; {cure}"


@pytest.mark.parametrize("missing", ["vllm", "deepspeed"])
def test_what_the_nodes_of_a_cluster_have_is_not_asked_of_the_driver(
    monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    monkeypatch.setattr(packages, "find_spec", lambda name: None if name == missing else name)
    check_algorithm(parse(train={"backend": "deepspeed"}, cluster={"address": "head:6379"}))


class WithMine(Algorithm):
    backend_methods = ("mine",)

    def make_pairs(self, turn):
        raise NotImplementedError


class Mine:
    """A backend with one more method."""

    def __init__(self, model_dir, settings, device):
        raise NotImplementedError

    def backward(self, loss, *, last_microbatch):
        raise NotImplementedError

    def logps(self, given):
        raise NotImplementedError

    mine = step = lambda self: None
    score = save = load = export_hf = logps


def test_a_method_that_only_a_users_algorithm_asks_for_is_looked_for_in_every_backend():
    algorithm = f"{__name__}:WithMine"
    check_algorithm(parse(algorithm=algorithm, train={"backend": f"{__name__}:Mine"}))
    assert problems(algorithm=algorithm) == "train.backend: fsdp2 has no method mine, which training needs"


def test_the_backends_by_name_have_what_any_algorithm_needs():
    """So the check at the start imports none of them."""
    for kind in BACKENDS:
        for algorithm in ALGORITHMS.values():
            assert all(hasattr(find_backend(kind), method) for method in (*METHODS, *algorithm.backend_methods))


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


class WithArgument(Outside):
    def __init__(self, value):
        pass


class Abstract(Algorithm):
    pass


class LateLoss(Outside):
    def objective(self, config, iteration):
        return Objective(loss=f"{__name__}:of_nothing" if iteration else "logistic")


class LateOwnLoss(Outside):
    def objective(self, config, iteration):
        return Objective(loss=f"{__name__}:mean" if iteration else "logistic")


class MisspeltLoss(Outside):
    def objective(self, config, iteration):
        return Objective(loss="logistc")


class WithoutWins(Outside):
    def objective(self, config, iteration):
        return Objective(loss="square")


class WithoutObjective(Outside):
    def objective(self, config, iteration):
        return "logistic"


class OwnObjective(Outside):
    given = Objective(loss="logistic")
    objective_fields = SPIN_FIELDS

    def objective(self, config, iteration):
        return self.given


class TokenSftWeight(OwnObjective):
    given = Objective(loss=f"{__name__}:of_tokens", sft_weight=0.5)


class TokenMeans(OwnObjective):
    given = Objective(loss=None, length_normalised=True)


class AnchorOfNoMargin(OwnObjective):
    given = Objective(loss=f"{__name__}:reference_free", positive_weight=50.0)


class NoiseWithoutSpace(OwnObjective):
    given = Objective(loss="logistic", mu=3.0)


class HistoryWithReference(OwnObjective):
    given = Objective(loss="logistic", history_weight=5.0)


class TopK(OwnObjective):
    given = Objective(loss=None, top_k=8)


class TopKAndLoss(OwnObjective):
    backend_methods = ("read",)
    makes_teacher_rows = True
    given = Objective(loss="logistic", top_k=8)


class WithoutReference(OwnObjective):
    given = Objective(loss="reference_free")


class NeedsTypo(Outside):
    needs = ("scorrer",)


class NeedsOneName(Outside):
    needs = "scorer"


class ReadsTypo(Outside):
    reads = ("self_filter.min_agreemnt",)


class FieldTypo(Outside):
    objective_fields = ("betta",)


class ProblemsNone(Outside):
    def problems(self, config):
        return None


class ProblemsText(Outside):
    def problems(self, config):
        return "oh no"


class ProblemsNumbers(Outside):
    def problems(self, config):
        yield 3


class ProblemsFail(Outside):
    def problems(self, config):
        yield config.scorer.kind


class NoLeastPack(Outside):
    def least_pack(self, config):
        return None


class LongPack(OwnObjective):
    def least_pack(self, config):
        return 10_000


class ReadsAField(OwnObjective):
    needs = ("scorer.path",)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("TokenSftWeight", r"its objective of iteration 0 has sft_weight 0\.5: the loss .*:of_tokens is one of tokens"),
        ("TokenMeans", "its objective of iteration 0 has length_normalised True: the loss SFT is one of tokens"),
        ("AnchorOfNoMargin", r"its objective .* has positive_weight 50\.0: the loss .* is no function of the margin"),
        ("NoiseWithoutSpace", r"its objective of iteration 0 has mu 3\.0: is for the loss space, not for logistic"),
        ("HistoryWithReference", r"its objective .* has history_weight 5\.0: its term takes a loss of pairs without"),
        ("TopK", "its objective of iteration 0 has top_k 8, which needs rows for a teacher; .*makes_teacher_rows"),
        ("TopKAndLoss", "its objective of iteration 0 has top_k 8: the teacher's divergence is minimised in place of"),
        ("NeedsTypo", r"its needs names 'scorrer', no setting .* \(did you mean scorer\?\); known are algorithm, "),
        ("NeedsOneName", r"its needs is 'scorer'; give a tuple of names, e\.g\. \('scorer',\)"),
        ("ReadsTypo", r"its reads names .*, no field of self_filter \(did you mean min_agreement\?\); known are grade"),
        ("FieldTypo", r"its objective_fields names 'betta', no field of objective \(did you mean beta\?\); known are"),
        ("ProblemsNone", "its problems gives None; yield a sentence for each problem"),
        ("ProblemsText", "its problems gives 'oh no'; yield a sentence for each problem"),
        ("ProblemsNumbers", r"its problems gives \[3\]; yield a sentence for each problem"),
        ("ProblemsFail", r"its problems fails \(AttributeError: 'NoneType' object has no attribute 'kind'\)"),
        ("NoLeastPack", "its least_pack gives None; return a number of tokens"),
        ("WithArgument", "cannot be made .*missing 1 required positional argument: 'value'"),
        ("Abstract", "cannot be made .*make_pairs"),
        ("Outside", r"its objective of iteration 0 fails \(NotImplementedError"),
        ("LateLoss", r"its objective of iteration 1: objective\.loss: module .* has no of_nothing"),
        ("LateOwnLoss", r"its objective of iteration 1: objective\.loss: .*:mean gives shape"),
        ("MisspeltLoss", r"its objective of iteration 0: objective\.loss: 'logistc' is unknown; use logistic"),
        (
            "WithoutWins",
            "its objective of iteration 0 has the loss square, which needs win probabilities; .*makes_wins",
        ),
        ("WithoutObjective", "its objective of iteration 0 is a str; expected a spin_ray.learner.step.Objective"),
    ],
)
def test_an_algorithm_that_would_fail_in_an_iteration_is_told_before_anything_runs(name, problem):
    assert re.search(f"^algorithm: {__name__}:{name}:? {problem}", problems(algorithm=f"{__name__}:{name}"))


def test_a_field_of_a_section_that_is_not_given_is_needed_all_the_same():
    assert problems(algorithm=f"{__name__}:ReadsAField") == f"scorer.path: algorithm {__name__}:ReadsAField needs it"


def test_a_pack_shorter_than_an_algorithm_from_outside_says_is_refused():
    assert problems(algorithm=f"{__name__}:LongPack").startswith("train.pack_length: 4096 may not hold a prompt with")


def test_alpha_is_refused_for_an_own_objective_without_a_reference_but_not_in_iteration_0():
    settings = {"algorithm": f"{__name__}:WithoutReference", "objective": {"reference_alpha": 0.5}}
    found = problems(**settings, iterations=2)
    assert "its objective of iteration 1 has reference_alpha 0.5: the loss reference_free has no reference" in found
    check_algorithm(parse(**settings, iterations=1))


class Bare:
    """Lacks what training asks for at its end alone."""

    def __init__(self, model_dir, settings, device):
        pass

    def logps(self, batch):
        raise NotImplementedError

    def backward(self, loss, *, last_microbatch):
        raise NotImplementedError

    def step(self):
        raise NotImplementedError

    score = load = logps


class Forwarding(Bare):
    def __getattr__(self, name):
        if name == "export_hf":
            raise AttributeError(name)
        return self.logps


class Whole(Bare):
    save = export_hf = Bare.logps


class TakesAll(Whole):
    """Takes all arguments, as decorated methods often do."""

    def backward(self, *given, **named):
        raise NotImplementedError

    @staticmethod
    def save(directory, compress=False):
        raise NotImplementedError


class EveryMicrobatch(Whole):
    def backward(self, loss):
        raise NotImplementedError


class BackwardByPosition(Whole):
    def backward(self, loss, last_microbatch, /):
        raise NotImplementedError


class SavesForRank(Whole):
    def save(self, directory, rank):
        raise NotImplementedError


class StaticStep(Whole):
    step = staticmethod(lambda backend: None)


def forwarding_backward(model_dir, settings, device):
    return EveryMicrobatch(model_dir, settings, device)


class OfTheProtocol(TrainBackend):
    def __init__(self, model_dir, settings, device):
        pass

    def step(self):
        raise NotImplementedError


class OneArgument(Whole):
    def __init__(self, model_dir):
        pass


def builds(model_dir, settings):
    raise NotImplementedError


def builds_all(*arguments):
    raise NotImplementedError


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("Bare", "train.backend: .*:Bare has no method save, export_hf, which training needs"),
        (
            "OneArgument",
            r"train.backend: .*:OneArgument is not called as \(model_dir\), but as \(model_dir, settings, ",
        ),
        (
            "EveryMicrobatch",
            r"train.backend: .*:EveryMicrobatch.backward takes \(self, loss\), but is called as backward\(loss, "
            r"last_microbatch=…\): got an unexpected keyword argument 'last_microbatch'",
        ),
        ("BackwardByPosition", r"backward takes \(self, loss, last_microbatch, /\), but is called as backward\(loss, "),
        (
            "SavesForRank",
            r"SavesForRank.save takes .* called as save\(directory\): missing a required argument: 'rank'",
        ),
        ("StaticStep", r"StaticStep.step takes \(backend\), but is called as step\(\)"),
        ("builds", r"train.backend: .*:builds is not called as \(model_dir, settings\), but as "),
    ],
)
def test_a_backend_that_training_cannot_use_to_its_end_is_told_before_anything_runs(name, problem):
    assert re.search(problem, problems(train={"backend": f"{__name__}:{name}"}))


def test_a_function_may_build_the_backend_and_a_class_may_forward_to_another():
    for name in ("builds_all", "Forwarding", "TakesAll"):
        check_algorithm(parse(train={"backend": f"{__name__}:{name}"}))


def test_a_backend_that_forwards_is_asked_once_it_is_built():
    settings = BackendSettings(kind=f"{__name__}:Forwarding", max_length=8)
    with pytest.raises(ConfigError, match="Forwarding has no method export_hf, which training needs"):
        make_backend("model", settings, torch.device("cpu"))


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("forwarding_backward", r"backward takes \(loss\), but is called as backward\(loss, last_microbatch=…\)"),
        ("Whole", "Whole has no attribute device; set it when built"),
    ],
)
def test_a_backend_that_only_its_object_shows_is_refused_once_it_is_built(name, problem):
    settings = BackendSettings(kind=f"{__name__}:{name}", max_length=8)
    with pytest.raises(ConfigError, match=f"^train.backend: .*{problem}"):
        make_backend("model", settings, torch.device("cpu"))


def mean(margin):
    return margin.mean()


def fp32_alone(margin):
    assert margin.dtype == torch.float32
    return -margin


OWN: dict[str, Any] = {"optimizer": {"name": "torch.optim:LBFGS"}}


@pytest.mark.parametrize(
    ("sections", "problem"),
    [
        ({"objective": {"loss": f"{__name__}:mean"}}, r"objective\.loss: .*:mean gives shape \(\)"),
        (
            {"objective": {"loss": f"{__name__}:fp32_alone"}, "data": {"train": "d", "heldout": "h"}},
            r"objective\.loss: .* in float64",
        ),
        ({"train": OWN}, r"optimizer\.name: torch\.optim:LBFGS fails .*closure"),
        ({"sft": OWN}, r"optimizer\.name: torch\.optim:LBFGS fails .*closure"),
        ({"algorithm": "seft", "reviser": OWN}, r"optimizer\.name: torch\.optim:LBFGS fails .*closure"),
    ],
)
def test_own_losses_and_optimizers_are_tried_before_anything_runs(sections, problem):
    assert re.search(problem, problems(**sections))


def test_a_loss_that_the_evaluation_does_not_compute_may_work_in_fp32_alone():
    check_algorithm(parse(objective={"loss": f"{__name__}:fp32_alone"}))


def test_muon_by_its_path_trains_adapters():
    check_algorithm(parse(train={"lora": {}, "optimizer": {"name": "torch.optim:Muon"}}))


class OwnLossOnce(Outside):
    def objective(self, config, iteration):
        return Objective(loss=f"{__name__}:mean" if iteration else "logistic")


def test_what_train_workers_import_is_every_loss_optimizer_and_backend_given_by_its_path():
    own = {"optimizer": {"name": "torch.optim:Adam"}}
    config = parse(algorithm=f"{__name__}:OwnLossOnce", train={"backend": "my:Backend"} | own, sft=own, iterations=3)
    assert imported_by_workers(config) == [
        ("objective.loss", f"{__name__}:mean"), ("train.backend", "my:Backend"), ("optimizer.name", "torch.optim:Adam"),
    ]  # fmt: skip
    assert imported_by_workers(parse()) == []


@pytest.mark.parametrize(
    ("sections", "setting"),
    [
        ({"objective": {"loss": "__main__:mine"}}, "objective.loss"),
        ({"train": {"backend": "__main__:mine"}}, "train.backend"),
        ({"train": {"optimizer": {"name": "__main__:mine"}}}, "optimizer.name"),
    ],
)
def test_what_is_in_the_script_itself_is_refused_where_workers_import_it(monkeypatch, sections, setting):
    monkeypatch.setattr(sys.modules["__main__"], "mine", mean, raising=False)
    assert problems(**sections) == (
        f"{setting}: __main__:mine is in the script or notebook itself, which no worker can import; put mine in a "
        "module that every machine of the run can import, e.g. my_pkg.mine:mine"
    )


def test_an_algorithm_may_be_in_the_script_itself(monkeypatch):
    monkeypatch.setattr(sys.modules["__main__"], "Mine", OwnLossOnce, raising=False)
    assert isinstance(find_algorithm("__main__:Mine"), OwnLossOnce)


def test_a_module_that_fails_while_it_is_imported_is_named_with_its_error(tmp_path, monkeypatch):
    (tmp_path / "breaks.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    assert "breaks:Mine cannot be imported (ZeroDivisionError: division by zero)" in problems(algorithm="breaks:Mine")


def test_an_algorithm_is_found_once_by_its_name_and_made_anew_by_its_path():
    assert find_algorithm("spin") is ALGORITHMS["spin"]
    assert type(find_algorithm("spin_ray.loop.algorithms.spin:Spin")) is type(ALGORITHMS["spin"])
    assert all(isinstance(each, Algorithm) for each in ALGORITHMS.values())
