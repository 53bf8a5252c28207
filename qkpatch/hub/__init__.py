"""The Hub: repositories by commit, byte ranges, one commit to publish."""
