"""The run folder: its artefacts, names, events, schemas and storage, the lease on it, and the cache of models."""
