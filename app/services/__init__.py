"""What the service does, in plain Python: no web in here."""
