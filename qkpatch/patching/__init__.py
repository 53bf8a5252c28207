"""The engine: files are carried while heads are edited."""
