"""The machines of a run: Ray, vLLM, train workers, and the sharing of models."""
