"""Every iterate of a run behind one OpenAI-compatible endpoint on Ray Serve."""
