"""Groups of an optimizer, one for each mesh."""

import torch

from spin_ray.learner.backends.meshes import group_by_mesh


def test_an_optimizer_that_holds_on_to_its_groups_still_hears_of_a_new_rate() -> None:
    """bitsandbytes' 8-bit AdamW steps by the groups of an inner optimizer."""
    outer, inner = (torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=1.0) for _ in range(2))
    outer.param_groups = inner.param_groups
    group_by_mesh(outer)
    for group in outer.param_groups:
        group["lr"] = 0.5
    assert [group["lr"] for group in inner.param_groups] == [0.5]
