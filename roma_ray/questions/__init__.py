"""What is asked: the question record, readers, splits, prompts and the registry of hub datasets."""
