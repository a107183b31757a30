"""Scale of a Kronecker product that brings it nearest to the Fisher."""

from smallfry.curvature.kronecker import inner_product, squared_norm


def best_scale(rows, a, g):
    """The scalar c that minimises ‖F − c A ⊗ G‖."""
    return inner_product(rows, a, g) / squared_norm(a, g)
