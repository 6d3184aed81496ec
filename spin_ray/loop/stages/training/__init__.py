"""Training of an iterate: the stage, its job, its workers, their log and checkpoints."""
