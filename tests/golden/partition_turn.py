"""Tangents arrive at the turn, which takes only outputs that have one; results go out at the end.

The transposed weight is made again for each backward reader, the activation `h` is kept. The second output
takes no gradient.
"""


def before(
    x: "f32[4, 4] | input:0",
    w: "f32[4, 4] | parameter:fc.w",
    tangent_1: "f32[4, 4] | tangent:1",
):
    # forward: fc
    t: "f32[4, 4]{1, 4}" = aten.t.default(w)
    v: "f32[16]" = aten.view.default(w, [16])
    part: "f32[4]" = aten.slice.Tensor(v, 0, 0, 4)
    h: "f32[4, 4]" = aten.mm.default(x, t)
    y: "f32[4, 4]" = aten.mul.Tensor(h, part)
    # backward: fc
    dh: "f32[4, 4]" = aten.mul.Tensor(tangent_1, part)
    dx: "f32[4, 4]" = aten.mm.default(dh, t)
    dw: "f32[4, 4]" = aten.mm.default(dx, h)
    return {"output:0": h, "output:1": y, "gradient:fc.w": dw, "gradient:input:0": dx}


def after(
    x: "f32[4, 4] | input:0",
    w: "f32[4, 4] | parameter:fc.w",
):
    # forward: fc
    t: "f32[4, 4]{1, 4}" = aten.t.default(w)
    v: "f32[16]" = aten.view.default(w, [16])
    part: "f32[4]" = aten.slice.Tensor(v, 0, 0, 4)
    h: "f32[4, 4]" = aten.mm.default(x, t)
    y: "f32[4, 4]" = aten.mul.Tensor(h, part)
    # forward
    turn: "(f32[4, 4])" = yield [h, y], [1]
    # backward
    tangent_2: "f32[4, 4]" = turn[0]
    # backward: fc
    v_1: "f32[16]" = aten.view.default(w, [16])
    part_1: "f32[4]" = aten.slice.Tensor(v_1, 0, 0, 4)
    dh: "f32[4, 4]" = aten.mul.Tensor(tangent_2, part_1)
    t_1: "f32[4, 4]{1, 4}" = aten.t.default(w)
    dx: "f32[4, 4]" = aten.mm.default(dh, t_1)
    dw: "f32[4, 4]" = aten.mm.default(dx, h)
    return {"gradient:fc.w": dw, "gradient:input:0": dx}
