"""The algorithms by name, and those of other packages by import path."""

from spin_ray.loop.algorithms.base import Algorithm
from spin_ray.loop.algorithms.continued_sft import ContinuedSft
from spin_ray.loop.algorithms.dpo import Dpo
from spin_ray.loop.algorithms.seft.algorithm import Seft
from spin_ray.loop.algorithms.self_reinforcement import SelfReinforcement
from spin_ray.loop.algorithms.spin import Spin
from spin_ray.loop.algorithms.sppo.algorithm import Sppo

ALGORITHMS: dict[str, Algorithm] = {
    "spin": Spin(),
    "continued_sft": ContinuedSft(),
    "dpo": Dpo(),
    "sppo": Sppo(),
    "self_reinforcement": SelfReinforcement(),
    "seft": Seft(),
}
"""Everything else (sampling, packing, reference scores, training, evaluation, resuming) is the same for all of them."""
