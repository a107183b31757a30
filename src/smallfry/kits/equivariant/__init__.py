"""Networks that are equivariant to a matrix group, tried on distorted digits.

Mironenco and Forré, "Lie Group Decompositions for Equivariant Neural Networks", ICLR 2024, arXiv
2310.11366.
"""
