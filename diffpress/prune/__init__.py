"""Pruning: structure that goes away, so that what is left is a smaller static graph."""
