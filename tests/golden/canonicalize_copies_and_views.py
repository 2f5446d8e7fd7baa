"""A copy of what nobody else reads goes, and so does a view between one and its base. What is read twice, an input's, or
one in another order stays a copy, so does a part, and what passes between modules keeps its shape. Outputs share no
memory, also where both are views of the same."""


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
    s: "f32[8, 4]" = aten.exp.default(x)
    s1: "f32[1, 4]" = aten.slice.Tensor(s, 0, 0, 1)
    s2: "f32[1, 4]" = aten.clone.default(s1)
    e: "f32[8, 4]" = aten.neg.default(x)
    e1: "f32[8, 4]" = aten.clone.default(e)
    e2: "f32[32]" = aten.view.default(e1, [32])
    f: "f32[8, 4]" = aten.neg.default(x)
    f1: "f32[32]" = aten.view.default(f, [32])
    n: "(f32[8, 4], f32[8, 1], f32[8, 1])" = aten.native_layer_norm.default(x, [4], None, None, 1e-05)
    n1: "f32[8, 4]" = n[0]
    n2: "f32[8, 4]" = aten.clone.default(n1)
    n3: "f32[8, 4]" = aten.tan.default(n2)
    return {"output:0": g5, "output:1": x1, "output:2": s2, "output:3": e2, "output:4": f1, "output:5": n3}


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
    s: "f32[8, 4]" = aten.exp.default(x)
    s1: "f32[1, 4]" = aten.slice.Tensor(s, 0, 0, 1)
    s2: "f32[1, 4]" = aten.clone.default(s1)
    e: "f32[8, 4]" = aten.neg.default(x)
    e2: "f32[32]" = aten.view.default(e, [32])
    f: "f32[8, 4]" = aten.neg.default(x)
    f1: "f32[32]" = aten.view.default(f, [32])
    n: "(f32[8, 4], f32[8, 1], f32[8, 1])" = aten.native_layer_norm.default(x, [4], None, None, 1e-05)
    n1: "f32[8, 4]" = n[0]
    n3: "f32[8, 4]" = aten.tan.default(n1)
    return {"output:0": g5, "output:1": x1, "output:2": s2, "output:3": e2, "output:4": f1, "output:5": n3}
