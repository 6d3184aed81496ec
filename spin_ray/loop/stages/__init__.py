"""The stages of an iteration: each reads artefacts of the run folder and commits one."""
