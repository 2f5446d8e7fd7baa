"""What is averaged ends a run; what no example goes into is computed once, and counts once for each microbatch."""


def before(
    batch: "f32[4] | input:0",
    w: "f32[] | parameter:scale",
    tangent: "f32[] | tangent:0",
):
    # forward
    x: "f32[2]" = geminifx.microbatch(batch, 0, 2)
    square: "f32[]" = aten.mul.Tensor(w, w)
    y: "f32[2]" = aten.mul.Tensor(x, w)
    loss: "f32[]" = aten.mean.default(y)
    penalized: "f32[]" = aten.add.Tensor(loss, square)
    average: "f32[]" = geminifx.average(penalized)
    # backward
    share: "f32[]" = aten.div.Tensor(tangent, 2)
    slope: "f32[]" = aten.mul.Tensor(share, w)
    twice: "f32[]" = aten.add.Tensor(slope, slope)
    dy: "f32[2]{0}" = aten.expand.default(share, [2])
    d: "f32[2]" = aten.div.Scalar(dy, 2)
    by_x: "f32[2]" = aten.mul.Tensor(d, x)
    dw: "f32[]" = aten.sum.default(by_x)
    both: "f32[]" = aten.add.Tensor(dw, twice)
    return {"output:0": average, "gradient:scale": both}


def after(
    batch: "f32[4] | input:0",
    w: "f32[] | parameter:scale",
    tangent: "f32[] | tangent:0",
):
    # forward
    square: "f32[]" = aten.mul.Tensor(w, w)
    x: "f32[2]" = geminifx.microbatch(batch, 0, 2)
    y: "f32[2]" = aten.mul.Tensor(x, w)
    loss: "f32[]" = aten.mean.default(y)
    penalized: "f32[]" = aten.add.Tensor(loss, square)
    x_1: "f32[2]" = geminifx.microbatch(batch, 1, 2)
    y_1: "f32[2]" = aten.mul.Tensor(x_1, w)
    loss_1: "f32[]" = aten.mean.default(y_1)
    penalized_1: "f32[]" = aten.add.Tensor(loss_1, square)
    add: "f32[]" = aten.add.Tensor(penalized, penalized_1)
    div: "f32[]" = aten.div.Tensor(add, 2)
    # backward
    share: "f32[]" = aten.div.Tensor(tangent, 2)
    slope: "f32[]" = aten.mul.Tensor(share, w)
    mul: "f32[]" = aten.mul.Tensor(slope, 2)
    total: "f32[]" = aten._to_copy.default(mul, dtype=torch.float32)
    total_1: "f32[]" = aten.add_.Tensor(total, mul)
    twice: "f32[]" = aten.add.Tensor(slope, slope)
    dy: "f32[2]{0}" = aten.expand.default(share, [2])
    d: "f32[2]" = aten.div.Scalar(dy, 2)
    by_x: "f32[2]" = aten.mul.Tensor(d, x)
    dw: "f32[]" = aten.sum.default(by_x)
    total_2: "f32[]" = aten.add_.Tensor(total_1, dw)
    both: "f32[]" = aten.add.Tensor(dw, twice)
    by_x_1: "f32[2]" = aten.mul.Tensor(d, x_1)
    dw_1: "f32[]" = aten.sum.default(by_x_1)
    total_3: "f32[]" = aten.add_.Tensor(total_2, dw_1)
    both_1: "f32[]" = aten.add.Tensor(dw_1, twice)
    return {"output:0": div, "gradient:scale": total_3}
