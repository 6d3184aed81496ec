"""The arena, where people compare two iterates blindly and vote."""
