"""Many edits of one checkpoint from one read: the grid, the figures of its variants, what SWEEP/ holds."""
