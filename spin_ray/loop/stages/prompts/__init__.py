"""Prompt rows are made of the data."""
