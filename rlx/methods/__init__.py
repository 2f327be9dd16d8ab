"""What is new in one paper and shared with no other: a module each, pure functions."""
