"""Distillation of more than logits."""
