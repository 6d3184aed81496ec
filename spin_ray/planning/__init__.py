"""Predicted time and memory of a recipe on a cluster, by arithmetic only: no Ray, no torch.

    plan ──> tables, paper, remedies, scaling ──> run_cost ──> learner_cost, generation_cost ──> work, stage_cost
                                              └─> cluster  └─> mesh                          ├─> traffic ──> groups
                                                                                             └─> weights, hardware, …
"""
