"""Ray, vLLM, train workers, and copies of models on other machines."""
