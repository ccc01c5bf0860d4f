"""The objective: corruption, position weights and denominators."""
