"""Methods of the chapter: Quantized networks."""
