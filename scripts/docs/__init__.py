"""The pages of the documentation that are written by a program: ``make docs``."""
