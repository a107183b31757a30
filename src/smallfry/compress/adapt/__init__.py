"""Adapters: small trainable parts of a frozen model."""
