"""Everything that is said of a run."""
