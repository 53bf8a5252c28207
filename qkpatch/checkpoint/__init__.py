"""Files and the Hub: headers, byte ranges, copies, staging. No algebra lives here."""
