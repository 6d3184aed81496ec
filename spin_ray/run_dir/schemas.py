"""Arrow schemas of the rows on disk."""

import pyarrow as pa

TOKEN_IDS = pa.list_(pa.int32())

PROMPT_SCHEMA = pa.schema(
    [
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("prompt_ids", TOKEN_IDS, nullable=False),
        pa.field("real_ids", TOKEN_IDS, nullable=False),
        pa.field("messages", pa.string(), nullable=False),
        pa.field("answer", pa.float64()),
        pa.field("rejected_ids", TOKEN_IDS),
    ]
)
"""One SFT row, rendered by the chat template and tokenised once; nothing later tokenises text again.

Example: ``{"prompt_id": "9f2c…", "prompt_ids": [1, 9690, …], "real_ids": [38, 446, …, 2],
"messages": '[{"role": "user", …}, {"role": "assistant", …}]', "answer": 7.0}``.
``real_ids`` is the human response and its end-of-turn token; it is empty for an unlabelled question. ``answer`` and
``rejected_ids``, the worse response of a preference pair, are null where the data has none.
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
"""One response y′ of the opponent, as the token ids that the engine gave.

Example: ``{"prompt_id": "9f2c…", "sample": 0, "opponent": "sft", "token_ids": [339, …, 2],
"finish_reason": "stop", "seed": 5310…}``. The response ends with the end-of-turn token only if the engine stopped on
it (``"stop"``). A response cut at ``max_tokens`` has ``"length"`` and no such token.
"""

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
"""One training pair: x, y and y′ of the opponent of ``iteration``.

Example: ``{"pair_id": "9f2c…/000/0", "prompt_id": "9f2c…", "iteration": 0, "prompt_ids": […], "real_ids": […],
"generated_ids": […]}``; the last part of ``pair_id`` is the sample number. An SFT row has an empty ``generated_ids``.
"""

REFERENCE_SCHEMA = pa.schema(
    [
        pa.field("pair_id", pa.string(), nullable=False),
        pa.field("real_logp", pa.float32(), nullable=False),
        pa.field("generated_logp", pa.float32(), nullable=False),
    ]
)
"""log p_ref of both responses of a pair, in nats, summed over response tokens by the trainer's kernels."""

WIN_SCHEMA = pa.schema(
    [
        pa.field("pair_id", pa.string(), nullable=False),
        pa.field("real_win", pa.float32(), nullable=False),
        pa.field("generated_win", pa.float32(), nullable=False),
    ]
)
"""SPPO's estimates of the probability that each response of a pair beats a response of the opponent."""
