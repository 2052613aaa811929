"""A small trained vision transformer: digits on cluttered canvases, the model, and its training."""
