"""Methods of the chapter: Training dynamics and implicit regularization."""
