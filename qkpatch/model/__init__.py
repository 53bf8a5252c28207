"""From SOURCE to the tensors of its language model."""
