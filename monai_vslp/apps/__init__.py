"""Adapters that offer the workflows to servers and platforms; each needs its own environment."""
