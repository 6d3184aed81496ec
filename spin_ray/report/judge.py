"""A model at an endpoint as judge between two iterates, after MT-Bench (arXiv 2306.05685).

Every pair is judged in both orders, as judges favour a place.
"""

import hashlib
import json
import math
import os
import re
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, Literal

from spin_ray.config.recipe import SpinConfig
from spin_ray.errors import ConfigError, StageError, first_line
from spin_ray.report.endpoint import unreachable
from spin_ray.report.examples import Example, read_examples
from spin_ray.report.redaction import hide_in_text
from spin_ray.run_dir.events import read_json_lines
from spin_ray.run_dir.run_dir import RunDir

Verdict = Literal["first", "second", "tie", "unclear"]
_VERDICTS: dict[str, Verdict] = {"A": "first", "B": "second", "C": "tie"}
_FORM = re.compile(r"\[\[([ABC])\]\]")
_TASK = """Compare two replies to the last message of the conversation below.
Judge how well each answers, whether what it says is right, and whether it fits the conversation.
Neither its place, nor its length, nor its name counts.
Give your reasons in a few sentences, then end with exactly one of:
[[A]] if reply A is better, [[B]] if reply B is better, [[C]] if they are equally good.

<conversation>
{conversation}
</conversation>

<reply name="A">
{first}
</reply>

<reply name="B">
{second}
</reply>"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judge:
    """The judging model at its endpoint."""

    endpoint: str
    """Base URL, e.g. https://HOST/v1. The key is $OPENAI_API_KEY."""
    model: str
    timeout_s: float = 120
    parallel: int = 8
    tries: int = 4
    """Tries per question while the server is busy or silent."""
    wait_s: float = 2
    """Seconds before the second try, doubled before each further one."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """One pair judged in one order."""

    prompt_id: str
    first: str
    """Iterate whose reply was A."""
    second: str
    verdict: Verdict
    text: str
    judge: str = ""
    question: str = ""
    """Digest of conversation, replies and instruction."""


def run(run_dir: RunDir, config: SpinConfig, one: str, other: str, judge: Judge, limit: int) -> dict[str, Any]:
    """Judges ``one`` against ``other`` on up to ``limit`` held-out prompts.

    Writes ``judgements/ONE-OTHER.jsonl`` (raw, also after a failure) and ``.json`` (the returned summary).
    Skips questions that this judge has answered.

    Raises:
        ConfigError: no prompt has samples of both.
        StageError: the endpoint does not answer.
    """
    examples = [it for it in read_examples(run_dir, config, limit=limit) if {one, other} <= it.answers.keys()]
    if not examples:
        raise ConfigError(f"{run_dir.storage.root}: {one} and {other} have no held-out samples of the same prompts")
    raw = f"judgements/{one}-{other}.jsonl"
    known = {
        (line["judge"], line["question"]): Judgement(**line) for line in read_json_lines(run_dir.storage, raw)
    }  # fmt: skip
    asked = [(it, *order) for it in examples for order in ((one, other), (other, one))]
    new = any((judge.model, _digest(_task(*question))) not in known for question in asked)
    if new and (reason := unreachable(judge.endpoint)):
        raise StageError(f"{hide_in_text(judge.endpoint)}: gave no judgement ({hide_in_text(reason)})")
    judgements: list[Judgement] = []
    with run_dir.stage(f"{one}/judging") as counted, ThreadPoolExecutor(judge.parallel) as pool:
        found = [pool.submit(_ask_once, judge, known, *question) for question in asked]
        try:
            judgements += [future.result() for future in found]
        finally:
            for future in found:  # after a failure; questions already being asked are waited for
                future.cancel()
            done = [future.result() for future in found if not future.cancelled() and future.exception() is None]
            kept = known | {(it.judge, it.question): it for it in done}  # keeps judgements of other judges, too
            lines = "".join(json.dumps(asdict(judgement)) + "\n" for judgement in kept.values())
            run_dir.storage.replace(raw, lines.encode())
        counted["rows"] = len(examples)
    summary = summarise(judgements, one, other) | {"judge": judge.model, "endpoint": hide_in_text(judge.endpoint)}
    run_dir.storage.replace(f"judgements/{one}-{other}.json", json.dumps(summary, indent=1).encode())
    return summary


def summarise(judgements: Sequence[Judgement], one: str, other: str) -> dict[str, Any]:
    """Counts wins, ties and losses of ``one`` over prompts; the win rate counts ties half.

    A prompt is won if one order says so and the other does not contradict. The rates omit unclear prompts.
    ``agreement`` is the share of prompts on which both orders say the same. ``position_bias`` is the share of verdicts
    for the first place among those for a place, minus a half: each reply stands in each place once, so a judge that
    ignores places has 0.
    """
    by_prompt: dict[str, list[Judgement]] = {}
    for judgement in judgements:
        by_prompt.setdefault(judgement.prompt_id, []).append(judgement)
    counts = Counter({"wins": 0, "ties": 0, "losses": 0, "contradicting": 0, "unclear": 0})
    scores, places, agreeing = [], Counter[str](), 0
    for both in by_prompt.values():
        if any(judgement.verdict == "unclear" for judgement in both):
            counts["unclear"] += 1
            continue
        points = [_point(judgement, one) for judgement in both]
        total = sum(points)
        agreeing += len(set(points)) == 1
        places.update(judgement.verdict for judgement in both)
        counts["contradicting"] += total == 0 and any(points)
        counts["wins" if total > 0 else "losses" if total < 0 else "ties"] += 1
        scores.append(1.0 if total > 0 else 0.0 if total < 0 else 0.5)
    rate = sum(scores) / len(scores) if scores else None
    error = None
    if len(scores) > 1 and rate is not None:
        error = math.sqrt(sum((score - rate) ** 2 for score in scores) / (len(scores) - 1) / len(scores))
    placed = places["first"] + places["second"]
    return {
        "one": one, "other": other, **counts, "win_rate": rate, "standard_error": error,
        "agreement": agreeing / len(scores) if scores else None,
        "position_bias": places["first"] / placed - 0.5 if placed else None,
    }  # fmt: skip


def _point(judgement: Judgement, one: str) -> int:
    if judgement.verdict == "tie":
        return 0
    better = judgement.first if judgement.verdict == "first" else judgement.second
    return 1 if better == one else -1


def _ask_once(
    judge: Judge, known: dict[tuple[str, str], Judgement], example: Example, first: str, second: str
) -> Judgement:
    task = _task(example, first, second)
    question = _digest(task)
    if (judge.model, question) in known:
        return known[judge.model, question]
    text = ask(judge, task)
    verdicts = _FORM.findall(text)
    verdict: Verdict = _VERDICTS[verdicts[-1]] if verdicts else "unclear"  # the last one counts
    return Judgement(example.prompt_id, first, second, verdict, text, judge.model, question)


def _digest(task: str) -> str:
    return hashlib.sha256(task.encode()).hexdigest()[:32]


def _task(example: Example, first: str, second: str) -> str:
    conversation = "\n".join(f"{message['role']}: {message['content']}" for message in example.messages)
    return _TASK.format(conversation=conversation, first=example.answers[first], second=example.answers[second])


def ask(judge: Judge, task: str) -> str:
    """Returns the judge's answer.

    Raises:
        StageError: the server gave no judgement.
    """
    body = {"model": judge.model, "temperature": 0, "messages": [{"role": "user", "content": task}]}
    headers = {
        "Content-Type": "application/json",
        "Authorization": f"Bearer {os.environ.get('OPENAI_API_KEY', 'none')}",
    }
    url = f"{judge.endpoint.rstrip('/')}/chat/completions"
    for attempt in range(judge.tries):
        try:
            request = urllib.request.Request(url, json.dumps(body).encode(), headers)
            with urllib.request.urlopen(request, timeout=judge.timeout_s) as answer:
                return json.load(answer)["choices"][0]["message"]["content"] or ""
        except (OSError, ValueError, LookupError, TypeError) as error:
            refused = isinstance(error, urllib.error.HTTPError) and error.code < 500 and error.code != 429
            if refused or not isinstance(error, OSError) or attempt + 1 == judge.tries:
                said = hide_in_text(first_line(error))
                raise StageError(f"{hide_in_text(url)}: gave no judgement ({said})") from error
            time.sleep(judge.wait_s * 2**attempt)
    raise ValueError("tries must be at least 1")
