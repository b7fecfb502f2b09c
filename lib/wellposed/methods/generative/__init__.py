"""Methods of the chapter: Generative models, memorization and unlearning."""
