"""Methods of the chapter: Pruning, sparse training and low rank."""
