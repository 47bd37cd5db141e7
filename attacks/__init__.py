"""Attacks: each turns an `Observation` into a `Reconstruction`. `attacks.registry` lists them."""
