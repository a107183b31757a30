"""Scenes of Gaussian splats as positions and small networks of the other attributes.

Tang et al., "NeuralGS: Bridging Neural Fields and 3D Gaussian Splatting for Compact 3D
Representations", arXiv 2503.23162; Kerbl et al., "3D Gaussian Splatting for Real-Time Radiance
Field Rendering", SIGGRAPH 2023.
"""
