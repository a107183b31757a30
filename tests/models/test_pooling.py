import pytest
import torch
from torch.nn import functional as F

from smallfry.models.pooling import largest


def test_the_largest_value_is_over_the_last_dimensions():
    values = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    expected = values.numpy().reshape(2, 3, 20).max(2)
    assert torch.equal(largest(values), torch.from_numpy(expected))
    assert torch.equal(largest(values, dims=(3,)), torch.from_numpy(values.numpy().max(3)))


def test_a_network_with_it_can_be_traced():
    class Pool(torch.nn.Module):
        def forward(self, values):
            return largest(values)

    values = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.fx.symbolic_trace(Pool())(values), values.amax((2, 3)))


def test_gradients_of_compiled_and_eager_code_are_equal_where_one_value_is_largest():
    torch.compiler.reset()
    values = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    eager, compiled = values.clone().requires_grad_(), values.clone().requires_grad_()
    largest(eager).square().sum().backward()
    torch.compile(largest, backend="aot_eager")(compiled).square().sum().backward()
    assert torch.equal(eager.grad, compiled.grad)


def test_an_exported_program_keeps_one_reduction():
    class Pool(torch.nn.Module):
        def forward(self, values):
            return largest(values)

    program = torch.export.export(Pool(), (torch.randn(2, 3, 4, 5),))
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert called == ["aten.amax.default"]


@pytest.mark.slow  # Inductor compiles C++
def test_gradients_in_compiled_bfloat16_are_finite_on_a_cpu():
    class Small(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 16, 3)
            self.norm = torch.nn.BatchNorm2d(16)
            self.head = torch.nn.Linear(16, 10)

        def forward(self, images):
            return self.head(largest(F.gelu(self.norm(self.conv(images)))))

    torch.compiler.reset()
    torch.manual_seed(0)
    model = Small().to(memory_format=torch.channels_last)
    images = torch.randn(16, 3, 8, 8).to(memory_format=torch.channels_last)
    found = []
    for form in (model, torch.compile(model)):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = form(images).logsumexp(1).mean()
        loss.backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    eager, compiled = found
    assert compiled.isfinite().all()
    assert F.cosine_similarity(eager, compiled, dim=0) > 0.98
