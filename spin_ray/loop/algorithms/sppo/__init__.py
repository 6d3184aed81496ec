"""SPPO: the algorithm, its preferences, and the preference models that give them."""
