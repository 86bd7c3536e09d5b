"""Exit heads and their checkpoint, shared by training and serving."""
