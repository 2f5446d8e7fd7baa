"""What the backward reads of a quantised weight, directly or through a view, is made again of its codes: once, in front
of the first reader. What it does not read is dequantised for the forward alone.
"""


def before(
    x: "f32[4, 4] | input:0",
    codes: "i8[4, 4] | parameter:fc.codes",
    scales: "f32[4] | parameter:fc.scales",
    others: "i8[4, 4] | parameter:other.codes",
):
    # forward: other
    v: "f32[4, 4]" = geminifx.dequantize(others, scales, 'int8', [4, 4], torch.float32)
    h: "f32[4, 4]" = aten.mm.default(x, v)
    # forward: fc
    w: "f32[4, 4]" = geminifx.dequantize(codes, scales, 'int8', [4, 4], torch.float32)
    t: "f32[4, 4]{1, 4}" = aten.t.default(w)
    y: "f32[4, 4]" = aten.mm.default(h, t)
    # forward
    turn: "(f32[4, 4])" = yield [y], [0]
    # backward
    tangent: "f32[4, 4]" = turn[0]
    # backward: fc
    dy: "f32[4, 4]" = aten.mm.default(tangent, w)
    dx: "f32[4, 4]" = aten.mm.default(dy, t)
    return {"gradient:input:0": dx}


def after(
    x: "f32[4, 4] | input:0",
    codes: "i8[4, 4] | parameter:fc.codes",
    scales: "f32[4] | parameter:fc.scales",
    others: "i8[4, 4] | parameter:other.codes",
):
    # forward: other
    v: "f32[4, 4]" = geminifx.dequantize(others, scales, 'int8', [4, 4], torch.float32)
    h: "f32[4, 4]" = aten.mm.default(x, v)
    # forward: fc
    w: "f32[4, 4]" = geminifx.dequantize(codes, scales, 'int8', [4, 4], torch.float32)
    t: "f32[4, 4]{1, 4}" = aten.t.default(w)
    y: "f32[4, 4]" = aten.mm.default(h, t)
    # forward
    turn: "(f32[4, 4])" = yield [y], [0]
    # backward
    tangent: "f32[4, 4]" = turn[0]
    # backward: fc
    w_1: "f32[4, 4]" = geminifx.dequantize(codes, scales, 'int8', [4, 4], torch.float32)
    t_1: "f32[4, 4]{1, 4}" = aten.t.default(w_1)
    dy: "f32[4, 4]" = aten.mm.default(tangent, w_1)
    dx: "f32[4, 4]" = aten.mm.default(dy, t_1)
    return {"gradient:input:0": dx}
