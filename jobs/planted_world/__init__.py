"""A merged mixture-of-experts model with room for routing, over invented people, from one seed."""
