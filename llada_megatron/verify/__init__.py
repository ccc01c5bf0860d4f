"""Checks that a user can run: the installed code against stored numbers of the public reference code."""
