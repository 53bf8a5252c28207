"""OUT in a store: claimed first, made object by object in an order that no loader misreads, its manifest last."""
