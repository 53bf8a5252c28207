"""One OUT by several machines: each writes a part into a directory that they share, and one publishes the whole."""
