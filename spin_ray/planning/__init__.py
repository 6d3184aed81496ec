"""What a recipe would cost on a cluster, told before anything runs: time, memory, and what would make it fit.

plan (tables, refusal) -> remedies (knobs, each tried) -> cost_model (FLOPs and bytes) -> hardware, model_shape
"""
