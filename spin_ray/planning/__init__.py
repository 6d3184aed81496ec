"""Predicted time and memory of a recipe on a cluster.

    plan ──> tables, paper, remedies, scaling ──> run_cost ──> learner_cost, generation_cost ──> work, stage_cost
                                              └─> cluster  └─> mesh                          ├─> traffic ──> groups
                                                                                             └─> weights, hardware, …

Arithmetic only: no Ray, no torch.
"""
