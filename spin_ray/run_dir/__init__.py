"""The run folder: artefacts, names, events, schemas, storage, lease and model cache."""
