"""Bytes that train workers send and their time: by hand, and counted on gloo ranks of the real backend."""

from collections import Counter
from dataclasses import replace

import pytest

from benchmarks.traffic_check import Case, measure, predicted, save_model
from spin_ray.config.sections import Mesh
from spin_ray.planning.groups import Group, Ranks
from spin_ray.planning.hardware import BANDWIDTH_EFFICIENCY, GB, GPUS
from spin_ray.planning.traffic import Collective, step_collectives, step_time
from tests.support.planning_cases import TINY, tiny_config

H100 = GPUS["H100-80G"]


def sent(mesh: Mesh, packs: float = 1, tokens: float = 3, **train: object) -> dict[str, float]:
    config = tiny_config(workers=mesh.ranks, **train)
    found: Counter[str] = Counter()
    for it in step_collectives(config, TINY, Ranks(mesh=mesh, per_node=2), packs, tokens, backward=True):
        found[it.name] += it.sent
    return dict(found)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_ranks_send_the_bytes_of_the_plan(tmp_path):
    """Counted at torch's collectives, to the byte, in training and in scoring."""
    cases = [Case(Mesh(shard=2), sharding="shard_grad_op"), Case(Mesh(replicate=2, shard=2), every_pack=True)]
    model = save_model("tiny", tmp_path / "model")
    for case, ranks in zip(cases, measure(cases, model, tmp_path), strict=True):
        for counted in ranks:
            assert counted["training"] == predicted(case, model)
            assert counted["scoring"] == predicted(case, model, backward=False)


def test_replicas_exchange_gradients_alone_and_once_a_step():
    """1352 parameters in halves: a pack's gathers and scatters stay in the pair; 4 bytes of each half are summed."""
    for packs in (1, 3):
        found = sent(Mesh(replicate=2, shard=2), packs=packs, reduce_every_pack=True)
        assert found["weights"] == packs * 2 * (2 * 1184 + 168) / 2
        assert found["gradients"] == packs * 4 * 1352 / 2
        assert found["replicas"] == 2 * (4 * 1352 / 2) / 2


def test_a_tensor_group_sums_activations_twice_a_layer_and_gradients_of_five_inputs():
    """3 tokens of 8 numbers, 2 bytes each, half of them twice: 48 a sum; 2 layers of 2 sums forward, 5 backward."""
    assert sent(Mesh(tensor=2))["activations"] == 2 * (2 + 5) * 48
    assert sent(Mesh(tensor=2), gradient_checkpointing=True)["activations"] == 2 * (2 + 5 + 2) * 48


def test_adapters_leave_the_gradients_of_the_base_at_home():
    """Rank 2, all linear layers: 2 · (16+12+12+16 + 3·24) parameters a layer."""
    adapters = 2 * 2 * (16 + 12 + 12 + 16 + 3 * 24)
    found = sent(Mesh(shard=2), lora={"rank": 2})
    assert found["gradients"] == 4 * adapters / 2
    assert found["weights"] == 2 * (2 * (1184 + adapters) + 168) / 2
    assert "gradients" not in sent(Mesh(shard=2), lora={"target_modules": ["Wx"]}), "of unknown width"


def test_groups_lie_on_neighbouring_ranks():
    """Tensor groups of 2 on 2 nodes of 8: a shard has 4 members on a node, a pair of replicas one on each."""
    ranks = Ranks(mesh=Mesh(replicate=2, shard=4, tensor=2), per_node=8)
    assert (ranks.tensor.nodes, ranks.shard.nodes, ranks.replicate.nodes) == (1, 1, 2)
    assert Ranks(mesh=Mesh(shard=16), per_node=8).shard == Group(size=16, together=8)


def test_a_ring_over_nodes_enters_each_by_the_adapters_of_its_members():
    """450 GB/s within a node; 8 members share 8 adapters of 50, and one member has its own."""

    def rate(group: Group, network: float = 50 * GB) -> float:
        it = Collective(name="weights", phase="forward", group=group, sent=1e15, calls=0)
        return 1e15 / it.seconds(replace(H100, network=network)) / BANDWIDTH_EFFICIENCY / GB

    assert rate(Group(size=8, together=8)) == pytest.approx(450)
    assert rate(Group(size=16, together=8)) == pytest.approx(400)
    assert rate(Group(size=16, together=8), network=100 * GB) == pytest.approx(450)
    assert rate(Group(size=2, together=1)) == pytest.approx(50)


def test_what_computation_hides_costs_nothing_and_what_it_does_not_hide_is_added():
    one = Collective(name="weights", phase="forward", group=Group(size=2, together=2), sent=450 * GB, calls=0)
    half = replace(one, exposed=0.5)
    taken = one.seconds(H100)
    assert step_time([one], H100, {"forward": 9.0, "backward": 1.0}).seconds == pytest.approx(10)
    assert step_time([one], H100, {"forward": 0.0, "backward": 1.0}).seconds == pytest.approx(1 + taken)
    assert step_time([half], H100, {"forward": 9.0, "backward": 1.0}).seconds == pytest.approx(10 + taken / 2)
    assert step_time([one], H100, {"forward": 0.0, "backward": 1.0}).bound == "gathering weights"
    between = replace(one, group=Group(size=2, together=1))
    side_by_side = step_time([one, between], H100, {"forward": 0.0, "backward": 0.0})
    assert side_by_side.seconds == pytest.approx(between.seconds(H100)), "links work side by side"
    assert step_time([one, one], H100, {"forward": 0.0, "backward": 0.0}).seconds == pytest.approx(2 * taken)


def test_nothing_is_hidden_on_a_cpu():
    cpu = replace(H100, name="cpu")
    one = Collective(name="weights", phase="forward", group=Group(size=2, together=2), sent=450 * GB, calls=1)
    assert step_time([one], cpu, {"forward": 9.0, "backward": 1.0}).seconds == pytest.approx(10 + one.seconds(cpu))
