import torch

from rorqual.kernels.typed_torch import not_compiled


def test_what_is_not_compiled_is_called_as_it_is():
    """By torch.compile too, though the function was in use before anything was compiled."""
    seen, traced = [], []

    @not_compiled
    def places(x):
        seen.append(torch.compiler.is_compiling())
        return x.nonzero()

    def backend(graph, inputs):
        traced.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    def function(x):
        return places(x.cos()) + 1

    x = torch.ones(3)
    expected = places(x) + 1
    assert torch.equal(torch.compile(function, backend=backend)(x), expected)
    assert seen == [False, False]
    assert "cos" in traced
    assert not any("nonzero" in name for name in traced)
