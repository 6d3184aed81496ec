"""``spin-ray init``: a recipe that fits model, data and hardware."""
