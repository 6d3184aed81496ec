"""Small data sets: generated sums, and conversations between people.

A row is ``{"messages": [..., {"role": "assistant", ...}]}``; sums also have ``"answer"``. Hashes choose the rows, so
everyone gets the same.
"""

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from spin_ray.inputs.embedded.packages import package_file

Row = dict[str, Any]

Split = Literal["train", "heldout"]

ARITHMETIC_ROWS: dict[Split, int] = {"train": 512, "heldout": 64}
CHITCHAT_ROWS: dict[Split, int] = {"train": 192, "heldout": 48}


def write_jsonl(path: Path, rows: list[Row]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="ascii")


def arithmetic_rows(split: Split) -> list[Row]:
    """Generates sums of two numbers below 100: 512 rows to train on, 64 held out.

    The splits share no pair of numbers, not even mirrored.
    """
    pairs = sorted(((a, b) for a in range(100) for b in range(a, 100)), key=lambda pair: _rank(f"{pair[0]}+{pair[1]}"))
    start = 0 if split == "train" else ARITHMETIC_ROWS["train"]
    return [_sum_row(a, b) for a, b in pairs[start : start + ARITHMETIC_ROWS[split]]]


def _sum_row(smaller: int, larger: int) -> Row:
    mirrored = int(_rank(f"order {smaller}+{larger}"), 16) % 2
    a, b = (larger, smaller) if mirrored else (smaller, larger)
    return {"messages": _turns(f"{a} + {b} = ?", f"{a} + {b} = {a + b}"), "answer": a + b}


def chitchat_rows(split: Split) -> list[Row]:
    """Returns small talk between people: 192 rows to train on, 48 held out.

    A row is the first two messages of a conversation, or any four in sequence. No conversation, replying person or
    reply occurs twice. Rows with contact data, crude words, talk about the platform or rare words are left out.

    Source: PyPI package chitchat-dataset 0.9.0 (MIT), the BYU "Chit-Chat Challenge" of 2018.

    Raises:
        ConfigError: chitchat-dataset is not installed.
    """
    start = 0 if split == "train" else CHITCHAT_ROWS["train"]
    return _all_chitchat_rows()[start : start + CHITCHAT_ROWS[split]]


def reply_rows(split: Split) -> list[Row]:
    """Returns all 4,067 suitable replies; 80 % of the conversations are to train on.

    A row also has its ``conversation_id``, whose rows stand together in one split.

    Raises:
        ConfigError: chitchat-dataset is not installed.
    """
    conversations = chitchat_conversations()
    exchanges = sorted(_exchanges(conversations, people=5, shortest=3), key=lambda it: _rank(it.conversation))
    wanted = split == "heldout"
    return [
        {"messages": _turns(*it.texts), "conversation_id": it.conversation}
        for it in exchanges
        if (int(_rank(it.conversation)[:8], 16) >= 0.8 * 16**8) == wanted
    ]


def chitchat_conversations() -> dict[str, Any]:
    """Returns the package's conversations: id -> ``{"messages": [turn, ...]}``.

    A turn is one person's messages, ``[{"text", "sender", "timestamp"}, ...]``.

    Raises:
        ConfigError: chitchat-dataset is not installed.
    """
    path = package_file(
        "chitchat_dataset",
        "dataset.json",
        requirement="chitchat-dataset==0.9.0",
        sha256="d2a5d0bf6acf354fef51f3af39cbece2220d3b8f6086b658c3d335105798312a",
    )
    return json.loads(path.read_text(encoding="utf-8"))


@cache
def _all_chitchat_rows() -> list[Row]:
    candidates = sorted(_exchanges(chitchat_conversations()), key=lambda exchange: _rank("\n".join(exchange.texts)))
    taken: set[str] = set()
    rows: list[Row] = []
    for exchange in candidates:
        once = {exchange.conversation, exchange.replier, exchange.texts[-1].lower()}
        if taken.isdisjoint(once):
            taken |= once
            rows.append({"messages": _turns(*exchange.texts)})
    return rows


class _Exchange(NamedTuple):
    conversation: str
    replier: str
    texts: list[str]


def _exchanges(conversations: dict[str, Any], people: int = 20, shortest: int = 5) -> Iterator[_Exchange]:
    common = _words_of_many_people(conversations, people)
    for conversation, content in conversations.items():
        turns = content["messages"]
        for reply in range(1, len(turns)):
            if reply == 2:
                continue  # Two messages before a reply would start with the assistant.
            stretch = turns[max(0, reply - 3) : reply + 1]
            # Messages of one turn mostly lack full stops at their ends, so they cannot be joined.
            if any(len(turn) > 1 for turn in stretch):
                continue
            texts = [" ".join(turn[0]["text"].split()) for turn in stretch]
            lengths = [len(text.split()) for text in texts]
            if (
                shortest <= lengths[-1] <= 30
                and lengths[-2] >= shortest - 1
                and all(2 <= length <= 60 for length in lengths)
                and all(_presentable(text, common) for text in texts)
            ):
                yield _Exchange(conversation, stretch[-1][0]["sender"], texts)


def _words_of_many_people(conversations: dict[str, Any], people: int) -> set[str]:
    users: defaultdict[str, set[str]] = defaultdict(set)
    for content in conversations.values():
        for message in (message for turn in content["messages"] for message in turn):
            for word in _WORD.findall(message["text"].lower()):
                users[word].add(message["sender"])
    return {word for word, senders in users.items() if len(senders) >= people}


def _presentable(text: str, common: set[str]) -> bool:
    symbols = len(re.sub(r"[A-Za-z .,?!']", "", text))
    return (
        text.isascii()
        and symbols <= 0.05 * len(text)
        and not any(pattern.search(text) for pattern in (_CONTACT, _CRUDE, _PLATFORM, _NOISE))
        and common.issuperset(_WORD.findall(text.lower()))
    )


_WORD = re.compile(r"[a-z']+")
_CONTACT = re.compile(
    r"https?:|www\.|\w\.(com|org|net|edu|ly)\b|[@#]|\d{4}|(\d\D?){7}|\b(snap|insta)"
    r"|\b(facebook|whatsapp|twitter|tinder|phone|number|text me|e-?mail\w*|address|named?|live in)\b"
    r"|\b(hey|hi|hello),? (?-i:[A-Z])",
    re.IGNORECASE,
)
_CRUDE = re.compile(
    r"\b(sex|porn|fuck|shit|bitch|damn|crap|dick|boob|nude|slut|whore|nigg|fag|retard|rape|suicid|kill|idiot|jew|nazi"
    r"|racis|murder|depress|divorce|abus)"
    r"|\b(ass|asshole|hell|naked|gay|stupid|dumb|horny|kiss|drunk|drugs?|weed|hitler|trump|dead|die[ds]?|dying|death"
    r"|anxiety|cancer)\b",
    re.IGNORECASE,
)
_PLATFORM = re.compile(
    r"\b(prompts?|questions?|ipads?|laptop|challenge|competition|bots?|win|winning|points|leaderboard|conversations?"
    r"|chat\w*|app)\b",
    re.IGNORECASE,
)
_NOISE = re.compile(r"(.)\1{3}|\b(\w+)( \2\b){2}|[<>{}\[\]\\|*_^~`=]", re.IGNORECASE)


def _turns(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def _rank(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()
