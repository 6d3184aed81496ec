"""Sizes of what the learner holds. Planning counts with them and loads no torch."""

ROWS_PER_CHUNK = {"cpu": 256, "cuda": 4096}
"""Targets per chunk of logits: few enough for a CPU's cache, enough to keep a GPU busy."""
LENGTHS_OF_A_PACK = 16
"""Number of different pack lengths: more need more oneDNN kernels, fewer need more padding."""
MOMENTS = {
    "rmsprop": ("square_avg",),
    "adamw": ("exp_avg", "exp_avg_sq"),
    "muon": ("momentum_buffer",),
}
"""State tensors of the parameter's shape, fp32, by optimizer."""
