"""What was done: manifest, model card, fingerprint."""
