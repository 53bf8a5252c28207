"""OUT: which files it has, how they grow, how they appear."""
