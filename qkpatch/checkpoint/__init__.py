"""What is stored: files and headers, SOURCE, what OUT holds already. No algebra lives here."""
