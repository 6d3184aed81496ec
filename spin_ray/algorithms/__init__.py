"""The family: what an iteration plays, how its pairs are made, and which loss they feed; one algorithm a file.

Everything else (sampling, packing, reference scores, training, evaluation, resuming) is the same for all of them.
"""

from spin_ray.algorithms.base import Algorithm, Turn
from spin_ray.algorithms.continued_sft import ContinuedSft
from spin_ray.algorithms.dpo import Dpo
from spin_ray.algorithms.seft import Seft
from spin_ray.algorithms.self_reinforcement import SelfReinforcement
from spin_ray.algorithms.spin import Spin
from spin_ray.algorithms.sppo import Sppo
from spin_ray.config import AlgorithmName

__all__ = ["ALGORITHMS", "Algorithm", "Turn"]

ALGORITHMS: dict[AlgorithmName, Algorithm] = {
    "spin": Spin(),
    "continued_sft": ContinuedSft(),
    "dpo": Dpo(),
    "sppo": Sppo(),
    "self_reinforcement": SelfReinforcement(),
    "seft": Seft(),
}
