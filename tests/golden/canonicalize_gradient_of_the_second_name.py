"""A shared parameter that has a gradient under its second name alone keeps it, under the first name."""


def before(
    x: "f32[4, 4] | input:0",
    w: "f32[4, 4] | parameter:w",
    w2: "f32[4, 4] | parameter:w2 | tied=w",
    tangent: "f32[4, 4] | tangent:0",
):
    # forward
    h: "f32[4, 4]" = aten.mm.default(x, w)
    y: "f32[4, 4]" = aten.mm.default(h, w2)
    # backward
    dw2: "f32[4, 4]" = aten.mm.default(h, tangent)
    return {"output:0": y, "gradient:w2": dw2}


def after(
    x: "f32[4, 4] | input:0",
    w: "f32[4, 4] | parameter:w",
    tangent: "f32[4, 4] | tangent:0",
):
    # forward
    h: "f32[4, 4]" = aten.mm.default(x, w)
    y: "f32[4, 4]" = aten.mm.default(h, w)
    # backward
    dw2: "f32[4, 4]" = aten.mm.default(h, tangent)
    return {"output:0": y, "gradient:w": dw2}
