"""Generation of the embedded default: question families, tokenizer, pretraining and its measurements."""
