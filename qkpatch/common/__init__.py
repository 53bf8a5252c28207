"""What every room uses: text, JSON, YAML, ranges, signals, what only Linux has."""
