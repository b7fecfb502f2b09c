"""Methods of the chapter: Inverse problems and image restoration."""
