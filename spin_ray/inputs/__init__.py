"""Inputs of a run: data, conversations, chat templates and the model folder, found, checked and rendered."""
