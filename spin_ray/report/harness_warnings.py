"""lm-eval's warnings about what it measured, such as prompts that it cut. They are kept beside the scores."""

import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from spin_ray.report.redaction import hide_in_text

_LOGGERS = ("lm_eval.models", "lm_eval.utils", "lm_eval.evaluator_utils")
"""Loggers of prompts, answers and scores. The others tell of tasks and settings, which say nothing about numbers."""
OURS = logging.getLogger("lm_eval.models.spin_ray")
"""Logger of warnings that lm-eval lacks. They are counted as its own."""
_RETRIED = "Retrying"
"""Word in warnings about requests that an endpoint is sent again, which say nothing about numbers either."""
_MOST = 5
"""Warnings kept of one call of lm-eval, the most frequent ones."""
_LONGEST = 240

Warned = dict[str, Any]
"""A warning's ``text`` with ``N`` for each number, its ``count``, and the ``tasks`` that were measured together."""


class _Counting(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: Counter[str] = Counter()

    def emit(self, record: logging.LogRecord) -> None:
        text = hide_in_text(" ".join(record.getMessage().split()))
        if _RETRIED not in text:
            self.texts[re.sub(r"\d+", "N", text)[:_LONGEST]] += 1


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Counts lm-eval's warnings by text, each number in it replaced by ``N``."""
    counting = _Counting()
    with ExitStack() as stack:
        for name in _LOGGERS:
            logger = logging.getLogger(name)
            logger.addHandler(counting)
            stack.callback(logger.removeHandler, counting)
        yield counting.texts


def warned(texts: Counter[str], tasks: Sequence[str]) -> list[Warned]:
    """Returns what is kept of the warnings that came while ``tasks`` were measured together."""
    return [{"text": text, "count": count, "tasks": list(tasks)} for text, count in texts.most_common(_MOST)]


def distinct(results: Iterable[dict[str, Any]]) -> list[Warned]:
    """Returns each warning of the results once."""
    found: list[Warned] = []
    for result in results:
        found += [each for each in result["warnings"] if each not in found]
    return found


def sentences(results: Iterable[dict[str, Any]]) -> Iterator[str]:
    """Yields ``gsm8k, mmlu: lm-eval warned 12 times: …`` for each warning of the results."""
    for each in distinct(results):
        times = "once" if each["count"] == 1 else f"{each['count']:,} times"
        yield f"{', '.join(each['tasks'])}: lm-eval warned {times}: {each['text']}"
