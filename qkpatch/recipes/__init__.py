"""Model families as data: what a YAML file says, and what its words mean."""
