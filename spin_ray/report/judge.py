"""A model at an endpoint as judge between two iterates, after MT-Bench (arXiv 2306.05685).

Each pair is judged in both orders, because judges favour a place.
"""

import hashlib
import json
import logging
import re
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from spin_ray.config.recipe import SpinConfig
from spin_ray.errors import ConfigError, StageError
from spin_ray.report.endpoint import Unanswered, ask, unreachable
from spin_ray.report.examples import Example, read_examples
from spin_ray.report.redaction import hide_in_text
from spin_ray.report.uncertainty import SHARE, conversation_groups, standard_error
from spin_ray.run_dir.events import parse_json_lines
from spin_ray.run_dir.names import iterate_number
from spin_ray.run_dir.run_dir import RunDir
from spin_ray.run_dir.storage import Storage

logger = logging.getLogger(__name__)

Verdict = Literal["first", "second", "tie", "unclear"]
_VERDICTS: dict[str, Verdict] = {"A": "first", "B": "second", "C": "tie"}
_SAVE_S = 10.0
"""Seconds between two saves of judgements, each with a line of progress."""
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
    endpoint: str
    """Base URL, e.g. https://HOST/v1. The key is $OPENAI_API_KEY."""
    model: str
    timeout_s: float = 120
    parallel: int = 8
    tries: int = 4
    """Tries per question while the server is busy or silent."""
    wait_s: float = 2
    """Seconds before the second try, doubled for each further one. The server may ask for more."""
    longest_wait_s: float = 60
    """Longest wait that the server may ask for. A longer one ends the command."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """One pair judged in one order."""

    prompt_id: str
    first: str
    """Iterate with reply A."""
    second: str
    verdict: Verdict
    text: str
    judge: str
    question: str
    """Digest of the text that the judge gets."""


@dataclass(frozen=True, slots=True)
class Question:
    prompt_id: str
    first: str
    second: str
    task: str

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.task.encode()).hexdigest()[:32]


class Kept:
    """All judgements between two iterates, in a file of JSON lines."""

    def __init__(self, storage: Storage, path: str) -> None:
        self._storage, self._path = storage, path
        self._by_key: dict[tuple[str, ...], Judgement] = {}
        self._read(storage.find(path))

    def find(self, judge: str, question: Question) -> Judgement | None:
        return self._by_key.get(_key(judge, question, question.digest))

    def add(self, judgement: Judgement) -> None:
        self._by_key[_key(judgement.judge, judgement, judgement.question)] = judgement

    def save(self) -> None:
        """Writes all, and takes in what another process wrote before: its verdict on a question stands."""
        self._storage.update(self._path, self._with)

    def _with(self, content: bytes | None) -> bytes:
        self._read(content)
        return "".join(json.dumps(asdict(judgement)) + "\n" for judgement in self._by_key.values()).encode()

    def _read(self, content: bytes | None) -> None:
        for line in parse_json_lines(content or b""):
            self.add(Judgement(**line))


def _key(judge: str, pair: Judgement | Question, digest: str) -> tuple[str, ...]:
    """Returns a unique key. The digest alone is not unique: both orders of equal replies have the same text, and so
    have two equal rows.
    """
    return judge, digest, pair.prompt_id, pair.first


def run(run_dir: RunDir, config: SpinConfig, one: str, other: str, judge: Judge, limit: int) -> dict[str, Any]:
    """Judges ``one`` against ``other`` on up to ``limit`` held-out prompts; returns the summary.

    Skips questions that this judge has answered. Writes judgements to ``judgements/NEWER-OLDER.jsonl``, also after a
    failure, and the newer iterate's summary to the ``.json`` beside.

    Raises:
        ConfigError: both are one iterate, no prompt has samples of both, or the endpoint refuses key or model.
        StageError: the endpoint does not answer.
    """
    if one == other:
        raise ConfigError(f"--iterates: both names are of {one}; name two iterates")
    examples = [it for it in read_examples(run_dir, config, limit=limit) if {one, other} <= it.answers.keys()]
    if not examples:
        raise ConfigError(f"{run_dir.storage.root}: {one} and {other} have no held-out samples of the same prompts")
    newer, older = sorted((one, other), key=iterate_number, reverse=True)
    path = f"judgements/{newer}-{older}"
    kept = Kept(run_dir.storage, f"{path}.jsonl")
    asked = [_question(it, *order) for it in examples for order in ((one, other), (other, one))]
    new = [question for question in asked if kept.find(judge.model, question) is None]
    if new and (reason := unreachable(judge.endpoint)):
        raise StageError(f"{hide_in_text(judge.endpoint)}: gave no judgement ({hide_in_text(reason)})")
    with run_dir.stage(f"{newer}/judging") as counted:
        _ask_all(judge, new, kept)
        counted["rows"] = len(examples)
    judgements = [it for question in asked if (it := kept.find(judge.model, question))]
    groups = conversation_groups(pa.concat_tables(list(run_dir.heldout.tables())))
    by = {"judge": judge.model, "endpoint": hide_in_text(judge.endpoint)}
    summary = summarise(judgements, newer, older, groups) | by
    run_dir.storage.replace(f"{path}.json", json.dumps(summary, indent=1).encode())
    return summarise(judgements, one, other, groups) | by


def _ask_all(judge: Judge, questions: Sequence[Question], kept: Kept) -> None:
    """Adds all judgements to ``kept``. After a failure, adds those of the questions in flight."""
    asking = _Asking(judge)
    done, saved_at = 0, time.monotonic()
    with ThreadPoolExecutor(judge.parallel) as pool:
        found = [pool.submit(asking.judge, question) for question in questions]
        try:
            for future in as_completed(found):
                kept.add(future.result())
                done += 1
                if time.monotonic() - saved_at > _SAVE_S:
                    kept.save()
                    saved_at = time.monotonic()
                    logger.info("%d of %d questions judged", done, len(found))
        except Unanswered as error:
            said = "; what was judged is kept: the same command asks only what is left" if done else ""
            raise error.kind(f"{hide_in_text(judge.endpoint)}: gave no judgement ({error}){said}") from error
        finally:
            asking.gone.set()  # ends the waits for another try
            for future in found:
                future.cancel()
            kept.save()
            for future in found:
                if not future.cancelled() and future.exception() is None:
                    kept.add(future.result())
            kept.save()


def summarise(judgements: Sequence[Judgement], one: str, other: str, groups: Mapping[str, int]) -> dict[str, Any]:
    """Counts wins, ties and losses of ``one`` over prompts. The win rate counts a tie as half.

    A prompt is won if one order says so and the other does not contradict. Rates omit unclear prompts. ``agreement`` is
    the share of prompts with the same verdict in both orders. ``position_bias`` is the share of the first place among
    verdicts that are no tie, minus 0.5. A judge that ignores places has 0.

    Args:
        groups: result of ``conversation_groups``.
    """
    by_prompt: dict[str, list[Judgement]] = {}
    for judgement in judgements:
        by_prompt.setdefault(judgement.prompt_id, []).append(judgement)
    counts = Counter({"wins": 0, "ties": 0, "losses": 0, "contradicting": 0, "unclear": 0})
    scores, numbers, places, agreeing = [], [], Counter[str](), 0
    for prompt_id, both in by_prompt.items():
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
        numbers.append(groups[prompt_id])
    rate = sum(scores) / len(scores) if scores else None
    error = standard_error(np.asarray(scores), numbers, SHARE)
    placed = places["first"] + places["second"]
    return {
        "one": one, "other": other, **counts, "win_rate": rate, "standard_error": error, "draws": len(set(numbers)),
        "agreement": agreeing / len(scores) if scores else None,
        "position_bias": places["first"] / placed - 0.5 if placed else None,
    }  # fmt: skip


def _point(judgement: Judgement, one: str) -> int:
    if judgement.verdict == "tie":
        return 0
    better = judgement.first if judgement.verdict == "first" else judgement.second
    return 1 if better == one else -1


def _question(example: Example, first: str, second: str) -> Question:
    conversation = "\n".join(f"{message['role']}: {message['content']}" for message in example.messages)
    task = _TASK.format(conversation=conversation, first=example.answers[first], second=example.answers[second])
    return Question(example.prompt_id, first, second, task)


class _Asking:
    """State that the threads share while they ask one judge."""

    def __init__(self, judge: Judge) -> None:
        self._judge = judge
        self._heard = threading.Event()
        self.gone = threading.Event()
        """Set when nobody waits for answers any more."""
        self._failure: Unanswered | None = None
        self._sampling: dict[str, Any] = {"temperature": 0}

    def judge(self, question: Question) -> Judgement:
        """Raises Unanswered if this or an earlier question got no answer."""
        if self._failure is not None:
            raise self._failure
        try:
            text = self._answer(question.task)
        except Unanswered as error:
            self._failure = self._failure or error
            raise self._failure from error.__cause__
        self._heard.set()
        verdicts = _FORM.findall(text)
        verdict: Verdict = _VERDICTS[verdicts[-1]] if verdicts else "unclear"  # the last verdict counts
        return Judgement(
            question.prompt_id, question.first, question.second, verdict, text, self._judge.model, question.digest
        )

    def _answer(self, task: str) -> str:
        """Asks a busy server again. Asks a silent server again only if it has answered before."""
        judge = self._judge
        for attempt in range(judge.tries):
            try:
                return _content(self._ask(task))
            except Unanswered as error:
                last = attempt + 1 == judge.tries or (error.is_silence and not self._heard.is_set())
                if error.retry_s is None or last or error.retry_s > judge.longest_wait_s:
                    raise
                if self.gone.wait(max(error.retry_s, judge.wait_s * 2**attempt)):
                    raise
        raise Unanswered(f"no answer in {judge.tries} tries")

    def _ask(self, task: str) -> Any:
        """Asks once. If the model refuses a temperature, drops it for this and all later questions."""
        judge, messages = self._judge, [{"role": "user", "content": task}]
        body = {"model": judge.model, "messages": messages, **self._sampling}
        try:
            return ask(judge.endpoint, "chat/completions", body, judge.timeout_s)
        except Unanswered as error:
            if error.retry_s is not None or "temperature" not in body or "temperature" not in str(error):
                raise
        self._sampling = {}
        return self._ask(task)


def _content(answer: Any) -> str:
    try:
        text = answer["choices"][0]["message"]["content"] or ""
    except (LookupError, TypeError):
        text = None
    if not isinstance(text, str):
        raise Unanswered("an answer without choices[0].message.content; is this a chat server?")
    return text
