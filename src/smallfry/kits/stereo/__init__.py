"""Disparity and classes from two cameras: RTS2Net, generated scenes, KITTI and Middlebury.

Dovesi et al., "Real-Time Semantic Stereo Matching", ICRA 2020, arXiv 1910.00541.
"""
