"""Everything that is said of a run: measures, progress, status, trackers, cards, judges, the page."""
