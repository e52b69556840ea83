"""Volume to network to probabilities."""
