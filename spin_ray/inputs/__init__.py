"""Inputs of a run: data, conversations, chat templates and models."""
