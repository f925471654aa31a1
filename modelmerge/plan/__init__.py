"""What is to be done: the recipe, the overrides, and what happens to each tensor."""
