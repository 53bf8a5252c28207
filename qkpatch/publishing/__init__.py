"""The card of an edited model, and its commit."""
