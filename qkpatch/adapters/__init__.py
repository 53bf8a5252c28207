"""Low-rank adapters: the edit beside the checkpoint, built from the edit's own factors, in the form that PEFT reads."""
