"""The family: what an iteration plays, how its pairs are made, and which loss they feed; one algorithm a file.

Everything else (sampling, packing, reference scores, training, evaluation, resuming) is the same for all of them.
"""

from spin_ray.loop.algorithms.base import Algorithm, Turn
from spin_ray.loop.algorithms.continued_sft import ContinuedSft
from spin_ray.loop.algorithms.dpo import Dpo
from spin_ray.loop.algorithms.seft.algorithm import Seft
from spin_ray.loop.algorithms.self_reinforcement import SelfReinforcement
from spin_ray.loop.algorithms.spin import Spin
from spin_ray.loop.algorithms.sppo.algorithm import Sppo

__all__ = ["ALGORITHMS", "Algorithm", "Turn"]

ALGORITHMS: dict[str, Algorithm] = {
    "spin": Spin(),
    "continued_sft": ContinuedSft(),
    "dpo": Dpo(),
    "sppo": Sppo(),
    "self_reinforcement": SelfReinforcement(),
    "seft": Seft(),
}
