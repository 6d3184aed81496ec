"""The run folder: artefacts, names, events, schemas, storage, the cache, the lease."""
