"""Methods of the chapter: Adversarial examples and certified robustness."""
