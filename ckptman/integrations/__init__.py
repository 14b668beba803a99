"""Guests: ckptman inside the training frameworks of others, each in a room of its own that alone imports it."""
