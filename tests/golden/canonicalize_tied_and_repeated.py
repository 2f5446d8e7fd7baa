"""No-ops go, a repeated operator is computed once, two inputs of one parameter become one with one gradient."""


def before(
    x: "f32[4, 4] | input:0",
    w: "f32[4, 4] | parameter:w",
    w2: "f32[4, 4] | parameter:w2 | tied=w",
    tangent: "f32[4, 4] | tangent:0",
):
    # forward: head
    a: "f32[4, 4]{1, 4}" = aten.t.default(w)
    b: "f32[4, 4]{1, 4}" = aten.detach.default(a)
    c: "f32[4, 4]{1, 4}" = aten.t.default(w2)
    h: "f32[4, 4]" = aten.mm.default(x, b)
    y: "f32[4, 4]" = aten.mm.default(h, c)
    unread: "f32[4, 4]" = aten.relu.default(y)
    # backward: head
    dh: "f32[4, 4]" = aten.mm.default(tangent, w2)
    dw2: "f32[4, 4]" = aten.mm.default(tangent, h)
    dw: "f32[4, 4]" = aten.mm.default(dh, x)
    return {"output:0": y, "gradient:w": dw, "gradient:w2": dw2}


def after(
    x: "f32[4, 4] | input:0",
    w: "f32[4, 4] | parameter:w",
    tangent: "f32[4, 4] | tangent:0",
):
    # forward: head
    a: "f32[4, 4]{1, 4}" = aten.t.default(w)
    h: "f32[4, 4]" = aten.mm.default(x, a)
    y: "f32[4, 4]" = aten.mm.default(h, a)
    # backward: head
    dh: "f32[4, 4]" = aten.mm.default(tangent, w)
    dw2: "f32[4, 4]" = aten.mm.default(tangent, h)
    dw: "f32[4, 4]" = aten.mm.default(dh, x)
    add: "f32[4, 4]" = aten.add.Tensor(dw, dw2)
    return {"output:0": y, "gradient:w": add}
