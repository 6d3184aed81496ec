"""``spin-ray init``: looks at model, data and hardware, and writes a recipe that fits them."""
