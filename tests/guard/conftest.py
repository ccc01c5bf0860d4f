"""The corpus of the training tests, for the runs that the guard watches."""

from tests.training.conftest import corpus

__all__ = ["corpus"]
