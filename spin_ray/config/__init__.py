"""The recipe: settings (sections), combinations and identity (recipe), reading (load)."""
