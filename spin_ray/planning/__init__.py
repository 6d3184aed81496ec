"""Predicted time and memory of a recipe on a cluster.

    plan ──> tables, paper, remedies, scaling ──> run_cost ──> learner_cost, generation_cost ──> work, stage_cost
                                              └─> cluster  └─> mesh                          ├─> traffic ──> groups
                                                                                             └─> weights, hardware, …

Arithmetic, without Ray. Torch and transformers are imported only for a multimodal model, whose parameters are counted
by building it without weights.
"""
