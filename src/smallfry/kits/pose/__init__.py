"""Poses of one known rigid object: a compact CheckerPose network, renders, and BOP folders.

Lian, Ling, "CheckerPose: Progressive Dense Keypoint Localization for Object Pose Estimation with
Graph Neural Network", ICCV 2023.
"""
