"""What fits into memory: how much of it there is, what training takes, and which batch follows."""
