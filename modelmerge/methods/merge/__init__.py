"""Methods that turn T task vectors into one; each is a file, found by its name."""
