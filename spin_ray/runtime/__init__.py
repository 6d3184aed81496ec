"""The machines of a run: Ray's cluster, vLLM's engines, train workers, and the model's way to them."""
