"""SPPO and its preference models."""
