"""Methods of the chapter: Language models: data, fine-tuning, alignment."""
