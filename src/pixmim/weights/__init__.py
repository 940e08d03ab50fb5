"""How weights enter the house and leave it, as data: no model is built here."""
