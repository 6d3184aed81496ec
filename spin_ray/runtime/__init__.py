"""What the machines of a run do: Ray's cluster, vLLM's engines, training workers, the model's way to them."""
