"""Methods of the chapter: Transfer, few-shot and novel classes."""
