"""The corpus of the training tests, for the runs that start from a conversion."""

from tests.training.conftest import corpus

__all__ = ["corpus"]
