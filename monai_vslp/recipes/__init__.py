"""Overlays of ``train.json`` and ``train_head.json``: other ways to learn from the same bags, by name."""
