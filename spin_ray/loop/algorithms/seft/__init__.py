"""SEFT and its revision stage."""
