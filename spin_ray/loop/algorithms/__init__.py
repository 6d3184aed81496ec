"""The family of algorithms, one a file."""
