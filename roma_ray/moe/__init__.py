"""What is tuned: the routers of a mixture-of-experts model, read, replaced, sliced, trained and saved.

Works on stock transformers models only. Tensor names carry their shape:
B batch, S sequence, P read positions, T flat tokens (B x S), L tuned layers, E experts, D width, V vocabulary.
"""
