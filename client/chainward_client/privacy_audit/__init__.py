"""Attacks on and checks of the private training that really runs here: what `audit --empirical` is made of."""
