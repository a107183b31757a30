"""smallfry: small networks that do the work of big ones.

Importing it registers its models with timm: ``timm.create_model("vitrm_small_patch4_32")``.
"""

from smallfry import models, optim
from smallfry.cost import Cost, cost
from smallfry.version import __version__

__all__ = ["Cost", "__version__", "cost", "models", "optim"]
