"""Readers of files that somebody else wrote, against malformed input: `make fuzz`."""
