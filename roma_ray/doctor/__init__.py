"""`roma-ray doctor`: what is installed, what the machines have, whether the storage works; each fault with its remedy."""
