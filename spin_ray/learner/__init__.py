"""The learner, in plain torch."""
