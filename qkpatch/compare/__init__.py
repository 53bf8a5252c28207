"""Two checkpoints side by side: proof and difference."""
