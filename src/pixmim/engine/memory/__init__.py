"""Memory: how much there is, what training takes, which batch follows, and how it is kept."""
