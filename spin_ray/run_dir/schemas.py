"""Arrow schemas of the rows on disk."""

from collections.abc import Sequence

import pyarrow as pa

Column = pa.Array | pa.ChunkedArray
TOKEN_IDS = pa.list_(pa.int32())

PROMPT_SCHEMA = pa.schema(
    [
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("prompt_ids", TOKEN_IDS, nullable=False),
        pa.field("real_ids", TOKEN_IDS, nullable=False),
        pa.field("messages", pa.string(), nullable=False),
        pa.field("rejected_ids", TOKEN_IDS),
        pa.field("answer_text", pa.string()),
        pa.field("conversation_id", pa.string()),
    ]
)
"""One SFT row, tokenised once.

``real_ids`` is the human response with its end-of-turn token, empty for an unlabelled question. ``rejected_ids`` is the
worse response of a preference pair. ``answer_text`` is the answer that graders compare with. Rows of one
``conversation_id`` are parts of a conversation.
"""

GENERATION_SCHEMA = pa.schema(
    [
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("sample", pa.int32(), nullable=False),
        pa.field("opponent", pa.string(), nullable=False),
        pa.field("token_ids", TOKEN_IDS, nullable=False),
        pa.field("finish_reason", pa.string(), nullable=False),
        pa.field("seed", pa.int64(), nullable=False),
    ]
)
"""One response y′ of the opponent, without end-of-turn token if ``finish_reason`` is ``length``."""

AUDIT_SCHEMA = pa.schema(
    [
        pa.field("prompt_ids", TOKEN_IDS, nullable=False),
        pa.field("token_ids", TOKEN_IDS, nullable=False),
        pa.field("engine_logp", pa.float64(), nullable=False),
    ]
)
"""One response of the opponent, and its log-probability in nats by the engine that wrote it."""

PAIR_SCHEMA = pa.schema(
    [
        pa.field("pair_id", pa.string(), nullable=False),
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("iteration", pa.int32(), nullable=False),
        pa.field("prompt_ids", TOKEN_IDS, nullable=False),
        pa.field("real_ids", TOKEN_IDS, nullable=False),
        pa.field("generated_ids", TOKEN_IDS, nullable=False),
    ]
)
"""One training pair: x, y, and y′ of the opponent of ``iteration``.

``pair_id`` is unique and ends with the sample number. Rows of one ``prompt_id`` may differ in ``real_ids``; those with
the same prompt and y are packed together. SFT rows have an empty ``generated_ids``.
"""

TRIPLET_SCHEMA = PAIR_SCHEMA.append(pa.field("initial_ids", TOKEN_IDS, nullable=False))
"""A pair with y_0, θ_0's response to the same prompt (T-SPIN)."""

TEACHER_SCHEMA = pa.schema(
    [
        pa.field("pair_id", pa.string(), nullable=False),
        pa.field("top_ids", TOKEN_IDS, nullable=False),
        pa.field("top_logps", pa.list_(pa.float32()), nullable=False),
        pa.field("rest_logps", pa.list_(pa.float32()), nullable=False),
    ]
)
"""The teacher's distribution at each token of a response, in nats (SDFT).

``top_ids`` and ``top_logps`` hold the k likeliest tokens of each position, likeliest first, position after position.
``rest_logps`` has one entry per position: the log-probability of all other tokens.
"""

REFERENCE_SCHEMA = pa.schema(
    [
        pa.field("pair_id", pa.string(), nullable=False),
        pa.field("real_logp", pa.float32(), nullable=False),
        pa.field("generated_logp", pa.float32(), nullable=False),
    ]
)
"""log p_ref of both responses of a pair, in nats, summed over response tokens."""

WIN_SCHEMA = pa.schema(
    [
        pa.field("pair_id", pa.string(), nullable=False),
        pa.field("real_win", pa.float32(), nullable=False),
        pa.field("generated_win", pa.float32(), nullable=False),
    ]
)
"""SPPO's estimated probability that each response beats one of the opponent."""


def pairs_of(
    pair_ids: Sequence[str],
    iteration: int,
    prompt_id: Column | Sequence[str],
    prompt_ids: Column,
    real_ids: Column,
    generated_ids: Column | None = None,
) -> pa.Table:
    """Returns PAIR_SCHEMA rows; without ``generated_ids`` those of SFT."""
    count = len(pair_ids)
    generated = pa.array([[]] * count, TOKEN_IDS) if generated_ids is None else generated_ids
    iterations = pa.array([iteration] * count, pa.int32())
    return pa.table([pair_ids, prompt_id, iterations, prompt_ids, real_ids, generated], schema=PAIR_SCHEMA)
