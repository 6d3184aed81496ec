"""Training of an iterate."""
