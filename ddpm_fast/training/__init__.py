"""The trainer and what it stands on."""
