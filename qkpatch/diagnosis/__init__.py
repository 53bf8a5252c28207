"""`qkpatch recipes check`: which recipe fits a checkpoint, what does not, and a draft for an unknown family."""
