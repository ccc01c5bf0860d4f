"""How a run is split: process groups and layout-independent random numbers."""
