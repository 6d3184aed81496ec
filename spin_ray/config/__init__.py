"""The recipe: its sections with every setting, its identity, how it is read."""
