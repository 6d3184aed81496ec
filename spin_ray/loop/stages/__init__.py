"""The stages of an iteration."""
