"""Operators between fields: solutions of partial differential equations from their coefficients.

He, Liu, Xu, "MgNO: Efficient Parameterization of Linear Operators via Multigrid", ICLR 2024, arXiv
2310.19809; Li et al., "Fourier Neural Operator for Parametric Partial Differential Equations",
ICLR 2021, arXiv 2010.08895.
"""
