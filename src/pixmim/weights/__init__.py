"""How weights leave (and later enter) the house."""
