"""What every room uses: text, JSON, YAML, ranges, signals."""
