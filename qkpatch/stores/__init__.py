"""Files at any URL that fsspec knows, by byte ranges; a folder of a store to read, and one to write."""
