"""The page of errors, written from the source of the package."""
