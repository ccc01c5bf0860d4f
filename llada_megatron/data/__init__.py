"""Text to token files, and token files to packed sequences in one global order."""
