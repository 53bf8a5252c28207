"""What will be done, decided from headers alone; and the record of it."""
