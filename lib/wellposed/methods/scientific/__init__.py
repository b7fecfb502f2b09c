"""Methods of the chapter: Scientific machine learning."""
