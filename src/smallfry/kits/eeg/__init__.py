"""Drowsiness in EEG windows: a small network with explanations, generated subjects, and readers.

Cui, Lan, Sourina, Müller-Wittig, "EEG-Based Cross-Subject Driver Drowsiness Recognition With an
Interpretable Convolutional Neural Network", TNNLS 2022.
"""
