"""Probabilities to synapses: instances, partners, scores."""
