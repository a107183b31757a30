"""Network of named layers with a function of them."""

from torch import nn


class Net(nn.Module):
    """Layers, and a function of them and the inputs."""

    def __init__(self, function, **layers):
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, *given, **named):
        return self.function(self, *given, **named)

    def like(self, function):
        """The same layers in another function."""
        return Net(function, **dict(self.named_children()))
