"""Edits that need no second copy: patch files, SOURCE edited in place, and the way back."""
