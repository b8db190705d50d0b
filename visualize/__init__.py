"""What a model looks at, and the pictures of it."""
