"""Predicted time and memory of a recipe on a cluster.

    plan ──> tables, paper, remedies, scaling ──> run_cost ──> learner_cost, generation_cost ──> work, stage_cost
                                              └─> cluster  └─> mesh                          ├─> traffic ──> groups
                                                                                             └─> weights, hardware, …

Arithmetic, without Ray. Two things are measured: lengths of rows, with the tokenizer, and parameters of a multimodal
model, which the learner builds without weights.
"""
