"""Scaling laws: what loss a model of some size reaches after some tokens, fitted to runs; without torch."""
