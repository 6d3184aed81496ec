"""SEFT: the algorithm, and the revision of labels that it trains on."""
