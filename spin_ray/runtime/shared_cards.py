"""Engines that share a card start one after another.

vLLM counts all memory that goes from a card while it starts as its own (vllm#55827). Of two engines that start together
each would count the weights of the other, and have little or no room for keys and values.
"""

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from spin_ray.errors import StageError
from spin_ray.run_dir.lock import file_lock


@contextmanager
def alone_on_card(share: float, section: str, timeout_s: float) -> Iterator[None]:
    """Holds the lock of this process's card; with a card of its own, holds nothing.

    Args:
        share: ``resources.gpus`` of an engine, in ``section``. Below 1 a card is shared.
        timeout_s: ``start_timeout_s`` of ``section``.

    Raises:
        StageError: other engines held the lock for ``timeout_s``.
    """
    if not 0 < share < 1:
        yield
        return
    card = _card()
    lock = Path(tempfile.gettempdir(), f"spin_ray-{os.getuid()}", f"engine-{re.sub('[^A-Za-z0-9]+', '-', card)}.lock")
    with ExitStack() as held:
        try:
            held.enter_context(file_lock(lock, alone=True, timeout_s=timeout_s))
        except TimeoutError as error:
            raise StageError(
                f"{section}.start_timeout_s: after {timeout_s:g} s another engine is still starting on {card}, and "
                f"engines that share a card ({section}.resources.gpus {share:g}) start one after another; end a "
                "process that hangs there, or give engines more time"
            ) from error
        yield


def _card() -> str:
    """Returns the card that Ray gave to this process; the node, if its worker starts vLLM's processes elsewhere."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").strip()
    return f"GPU {visible}" if visible else "this node"
