"""Nothing changes: one product is put twice, one returned too, one is reshaped, and one has not the chunk's dtype; of
the sums one is of another dtype than its terms, one is read again, one is over none of its terms' dimensions, and one's terms
have none."""


def before(
    x: "f32[4, 4] | input:0",
):
    # forward
    h: "f32[4, 4]" = aten.sin.default(x)
    turn: "(f32[4, 4])" = yield [h], [0]
    # backward
    tangent: "f32[4, 4]" = turn[0]
    twice: "f32[4, 4]" = aten.mm.default(tangent, x)
    gradients: "f32[640] | chunk=0" = geminifx.gradients(640, torch.float32)
    geminifx.put(gradients, 0, twice)
    geminifx.put(gradients, 64, twice)
    returned: "f32[4, 4]" = aten.mm.default(tangent, h)
    geminifx.put(gradients, 128, returned)
    mm: "f32[4, 4]" = aten.mm.default(h, tangent)
    reshaped: "f32[2, 8]" = aten.view.default(mm, [2, 8])
    geminifx.put(gradients, 192, reshaped)
    low: "bf16[4, 4]" = aten._to_copy.default(x, dtype=torch.bfloat16)
    other: "bf16[4, 4]" = aten.mm.default(low, low)
    geminifx.put(gradients, 256, other)
    wide: "f32[4]" = aten.sum.dim_IntList(low, [0], dtype=torch.float32)
    geminifx.put(gradients, 320, wide)
    read: "f32[4]" = aten.sum.dim_IntList(tangent, [0])
    geminifx.put(gradients, 384, read)
    again: "f32[4]" = aten.neg.default(read)
    geminifx.put(gradients, 448, again)
    all_: "f32[]" = aten.sum.dim_IntList(tangent, [])
    geminifx.put(gradients, 512, all_)
    scalar: "f32[]" = aten.sum.dim_IntList(read, [0])
    point: "f32[]" = aten.sum.dim_IntList(scalar, [0])
    geminifx.put(gradients, 576, point)
    geminifx.reduce(gradients, 0, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
    geminifx.accumulate_grad(gradients, 0, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
    return {"gradient:input:0": returned}


def after(
    x: "f32[4, 4] | input:0",
):
    # forward
    h: "f32[4, 4]" = aten.sin.default(x)
    turn: "(f32[4, 4])" = yield [h], [0]
    # backward
    tangent: "f32[4, 4]" = turn[0]
    twice: "f32[4, 4]" = aten.mm.default(tangent, x)
    gradients: "f32[640] | chunk=0" = geminifx.gradients(640, torch.float32)
    geminifx.put(gradients, 0, twice)
    geminifx.put(gradients, 64, twice)
    returned: "f32[4, 4]" = aten.mm.default(tangent, h)
    geminifx.put(gradients, 128, returned)
    mm: "f32[4, 4]" = aten.mm.default(h, tangent)
    reshaped: "f32[2, 8]" = aten.view.default(mm, [2, 8])
    geminifx.put(gradients, 192, reshaped)
    low: "bf16[4, 4]" = aten._to_copy.default(x, dtype=torch.bfloat16)
    other: "bf16[4, 4]" = aten.mm.default(low, low)
    geminifx.put(gradients, 256, other)
    wide: "f32[4]" = aten.sum.dim_IntList(low, [0], dtype=torch.float32)
    geminifx.put(gradients, 320, wide)
    read: "f32[4]" = aten.sum.dim_IntList(tangent, [0])
    geminifx.put(gradients, 384, read)
    again: "f32[4]" = aten.neg.default(read)
    geminifx.put(gradients, 448, again)
    all_: "f32[]" = aten.sum.dim_IntList(tangent, [])
    geminifx.put(gradients, 512, all_)
    scalar: "f32[]" = aten.sum.dim_IntList(read, [0])
    point: "f32[]" = aten.sum.dim_IntList(scalar, [0])
    geminifx.put(gradients, 576, point)
    geminifx.reduce(gradients, 0, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
    geminifx.accumulate_grad(gradients, 0, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
    return {"gradient:input:0": returned}
