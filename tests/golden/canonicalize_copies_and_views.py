"""A copy of what nobody else reads goes, and so does a view between one and its base. What is read twice, an input's, or
one in another order stays a copy, and what passes between modules keeps its shape."""


def before(
    x: "f32[8, 4] | input:0",
):
    # forward: h.0.fc
    h: "f32[8, 4]" = aten.sin.default(x)
    h1: "f32[2, 4, 4]" = aten.view.default(h, [2, 4, 4])
    # forward: h.0
    h2: "f32[2, 4, 4]" = aten.clone.default(h1)
    h3: "f32[2, 4, 2, 2]" = aten.view.default(h2, [2, 4, 2, 2])
    # forward: h.1
    g: "f32[8, 4]" = aten.view.default(h3, [8, 4])
    g1: "f32[8, 4]" = aten.cos.default(g)
    g2: "f32[8, 4]" = aten.clone.default(g1)
    g3: "f32[8, 4]" = aten.add.Tensor(g1, g2)
    g4: "f32[4, 8]{1, 4}" = aten.t.default(g3)
    g5: "f32[4, 8]" = aten.clone.default(g4, memory_format=torch.contiguous_format)
    x1: "f32[8, 4]" = aten.clone.default(x)
    return {"output:0": g5, "output:1": x1}


def after(
    x: "f32[8, 4] | input:0",
):
    # forward: h.0.fc
    h: "f32[8, 4]" = aten.sin.default(x)
    # forward: h.0
    view: "f32[2, 4, 2, 2]" = aten.view.default(h, [2, 4, 2, 2])
    # forward: h.1
    g: "f32[8, 4]" = aten.view.default(view, [8, 4])
    g1: "f32[8, 4]" = aten.cos.default(g)
    g2: "f32[8, 4]" = aten.clone.default(g1)
    g3: "f32[8, 4]" = aten.add.Tensor(g1, g2)
    g4: "f32[4, 8]{1, 4}" = aten.t.default(g3)
    g5: "f32[4, 8]" = aten.clone.default(g4, memory_format=torch.contiguous_format)
    x1: "f32[8, 4]" = aten.clone.default(x)
    return {"output:0": g5, "output:1": x1}
