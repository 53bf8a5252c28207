"""One module per command: its options, what it calls, what it shows. No torch until it must be."""
