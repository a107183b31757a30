import pytest
from matplotlib.figure import Figure


@pytest.fixture
def figures(monkeypatch):
    """Figures that were encoded."""
    found = []
    save = Figure.savefig

    def coarse(figure, *given, **more):
        found.append(figure)
        figure.set_layout_engine("none")  # which takes most of the time
        save(figure, *given, **{**more, "dpi": 20})

    monkeypatch.setattr(Figure, "savefig", coarse)
    return found
