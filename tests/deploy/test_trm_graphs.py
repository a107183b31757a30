"""The graphs of an export hold TRM: embedding, one improvement step, and the heads."""

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from torch.testing import assert_close

from smallfry.deploy.graphs import anytime_graphs, exported_program, to_onnx


@pytest.mark.slow
@pytest.mark.parametrize("token_mlp", [True, False])
def test_a_step_as_a_graph_gives_the_models_answers(token_mlp):
    torch.manual_seed(0)
    sizes = {"embed_dim": 16, "mlp_hidden_dim": 16, "token_hidden_dim": 16, "depth": 1}
    sizes |= {"latent_steps": 2, "rounds": 2, "recursion_steps": 3}  # each is a part of the graph
    model = timm.create_model("trm_sudoku4_micro", token_mlp=token_mlp, **sizes).eval()
    torch.nn.init.normal_(model.halt_head.weight)
    graphs = anytime_graphs(model, torch.ones(2, 1, 4, 4))
    assert [graph.name for graph in graphs] == ["embed", "step", "read_out"]
    embed, step, read_out = (
        onnxruntime.InferenceSession(to_onnx(graph, exported_program(graph)).SerializeToString())
        for graph in graphs
    )
    grids = torch.randint(1, 6, (5, 1, 4, 4)).float()
    with torch.no_grad():
        trace = model.recurse(grids)
    x, y, z = embed.run(None, {"images": grids.numpy()})
    for wanted in trace:
        # each from the model's own state, as rounding grows from step to step
        y, z = step.run(None, {"x": x, "y": y, "z": z})
        logits, halting = read_out.run(None, {"y": y})
        assert logits.shape == (5, 16, 6)
        assert_close(torch.from_numpy(logits), wanted.logits, atol=1e-4, rtol=1e-4)
        assert_close(torch.from_numpy(halting), wanted.halt_logits.sigmoid(), atol=1e-4, rtol=0)
        y, z = (part.numpy() for part in wanted.state)
    assert np.isfinite(x).all()
