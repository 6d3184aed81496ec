"""What a recipe would cost on a cluster, told before anything runs: time, memory, and what would make it fit.

    plan ──> tables, paper, remedies ──> run_cost ──> learner_cost, generation_cost ──> work, stage_cost
                                     └─> cluster                                    └─> hardware, model_shape

Arithmetic only: no Ray, no torch.
"""
