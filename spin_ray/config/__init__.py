"""The recipe: every setting (sections), combinations and identity (recipe), reading (load)."""
