"""Training and scoring, in plain torch."""
