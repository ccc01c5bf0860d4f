"""A training step without data, messages or memory: what ranks of any world would hold and send."""
