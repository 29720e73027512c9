"""A scheduler from outside the tree."""
