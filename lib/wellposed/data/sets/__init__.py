"""One module a dataset, by its name: a ``CARD`` and, for images and rows, ``read(folder)``."""
