"""The learner, in plain torch: packing, losses, scores, the training step, loading, backends."""
