"""Methods that turn T task vectors into T others which are easier to merge; each is a file, found by its name."""
