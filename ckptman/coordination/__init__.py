"""Ranks that talk through a board: `hub` is the protocol, `life` says who is alive, the boards carry the bytes."""
