"""What modelmerge does, each a function that a notebook can call and that prints nothing."""
